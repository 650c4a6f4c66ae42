"""Run every benchmark of the asv suite once, in this process: whether they work, not how fast.

python -m benchmarks.once
"""

import importlib
import inspect
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("time_", "track_", "peakmem_", "mem_")


def suites() -> Iterator[type]:
    """The classes of the benchmark files that hold benchmarks."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        for suite in vars(module).values():
            if inspect.isclass(suite) and suite.__module__ == module.__name__:
                yield suite


def cases(suite: type) -> list[tuple[Any, ...]]:
    """All combinations of a class's parameters; asv lets a single list stand alone."""
    given = getattr(suite, "params", ())
    if given and not isinstance(given[0], tuple | list):
        given = (given,)
    return list(itertools.product(*given))


def run(suite: type) -> int:
    """Run a class's benchmarks with all its parameters, in the current directory; how many."""
    found = [name for name in dir(suite) if name.startswith(KINDS)]
    cache = (suite().setup_cache(),) if hasattr(suite, "setup_cache") else ()
    for values, name in itertools.product(cases(suite), found):
        benchmark = suite()
        try:
            getattr(benchmark, "setup", lambda *given: None)(*cache, *values)
        except NotImplementedError:  # asv's word for parameters that do not go together
            continue
        try:
            getattr(benchmark, name)(*cache, *values)
        finally:
            getattr(benchmark, "teardown", lambda *given: None)(*cache, *values)
    return len(found) * len(cases(suite))


def main() -> None:
    """Print each class with its benchmarks and seconds; an error of one ends the run."""
    for suite in suites():
        started, home = time.perf_counter(), Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                count = run(suite)
            finally:
                os.chdir(home)
        print(f"{suite.__module__}.{suite.__name__}: {count} in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
