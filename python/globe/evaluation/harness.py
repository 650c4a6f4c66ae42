"""Measure a checkpoint on tasks of the LM Evaluation Harness (package lm-eval)."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from globe.checkpoint.pretrained import first_line
from globe.errors import GlobeError, UsageError
from globe.evaluation.models import load_model

Figures = dict[str, dict[str, float | str]]


def evaluate_tasks(
    directory: str | Path,
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Figures:
    """Run tasks of lm-eval on a checkpoint directory, dense or factored.

    Parameters
    ----------
    directory : str or Path
        Checkpoint directory with a tokenizer.
    tasks : sequence of str
        Names of tasks or groups.
    task_path : str or Path, optional
        Folder with YAML files of more tasks.
    limit : int, optional
        Only the first documents of every task.
    few_shot : int, optional
        Examples before every question; as the task states if not given.
    batch_size : int
        Requests in a batch.
    device : str
        A torch device.
    trust_remote_code : bool
        Run Python code that a checkpoint brings with it (`auto_map`); without, such a checkpoint is refused.

    Returns
    -------
    dict
        Per task, its metrics by name: values and standard errors ("N/A" where there is none).

    Raises
    ------
    UsageError
        If a task is not known, or an argument is none.
    GlobeError
        If lm-eval is missing, the directory cannot be loaded, or a task cannot be run, as without its data set.
    """
    harness = import_harness()
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; expected at least 1 document")
    if task_path is not None and not Path(task_path).is_dir():
        raise UsageError(f"task path {task_path}: no such directory")
    if not tasks:
        raise UsageError("no task is named; `lm-eval ls tasks` lists them")
    manager, unknown = None, list(tasks)
    with _quiet():
        if task_path is not None:  # lm-eval's own thousands are read only if a name is not in the folder
            manager, unknown = _manager(harness, tasks, task_path, own=False)
        if unknown:
            manager, unknown = _manager(harness, tasks, task_path, own=True)
    if unknown:
        raise UsageError(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    model, tokenizer = load_model(directory, device, trust_remote_code=trust_remote_code)
    from lm_eval.models.huggingface import HFLM

    try:
        with _quiet():
            judged = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                prefix_token_id=_prefix(tokenizer),
                trust_remote_code=trust_remote_code,
            )
            found = harness.simple_evaluate(
                judged,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=few_shot,
                log_samples=False,
                bootstrap_iters=1000,
            )
    except Exception as error:  # of data sets, their hosts and the tasks' own code
        raise GlobeError(f"lm-eval cannot run {', '.join(tasks)}: {first_line(error)}") from error
    return {task: _named(figures) for task, figures in found["results"].items()}


def import_harness() -> Any:
    """The lm_eval package, which is an optional dependency."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise GlobeError(f'--lm-eval needs lm-eval ({error}): pip install "globe-moe[eval]"') from error
    return lm_eval


def _manager(harness: Any, tasks: Sequence[str], folder: str | Path | None, *, own: bool) -> tuple[Any, list[str]]:
    """The tasks of a folder, and lm-eval's `own`; and those asked for that are not there."""
    path = str(folder) if folder is not None else None
    manager = harness.tasks.TaskManager(include_path=path, include_defaults=own)
    return manager, [name for name in tasks if not manager.match_tasks([name])]


def _prefix(tokenizer: Any) -> int | None:
    """The context of a text without one: a line break where the tokenizer has no token that begins or ends texts."""
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return None
    return int(tokenizer("\n", add_special_tokens=False)["input_ids"][0])


def _named(figures: dict[str, Any]) -> dict[str, float | str]:
    """Metrics without lm-eval's mark of an absent filter ("acc,none")."""
    named: dict[str, float | str] = {}
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float | str):
            named[metric if kind == "none" else f"{metric} ({kind})"] = value
    return named


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval prints and logs nothing: stdout is for the figures."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
