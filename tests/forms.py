"""The forms in which a device is worked on, on the CPU: an expert to a core, batches, and batches without fp64."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from globe.compute import forms

FORMS = ("per core", "batched", "batched in fp32")
LOOKS = ("_local_scalar_dense", "item", "is_nonzero", "equal")


class Serial:
    """An engine that works on one expert after the other, on the caller's thread."""

    def map(self, work: Callable[[slice], Any], count: int) -> Iterator[tuple[slice, Any]]:
        """Experts in order, each with what `work` made of it."""
        for number in range(count):
            part = slice(number, number + 1)
            yield part, work(part)

    def run(self, work: Callable[[slice], None], count: int) -> None:
        """Call `work` for every expert."""
        for _ in self.map(work, count):
            pass

    def meanwhile(self, jobs: Iterable[Callable[[], Any]]) -> Iterator[Any]:
        """The jobs' results in order."""
        return (job() for job in jobs)


@contextmanager
def form(name: str) -> Iterator[None]:
    """Work on the CPU in one of `FORMS`."""
    with pytest.MonkeyPatch.context() as patch:
        if name != "per core":
            patch.setattr(forms, "_PER_CORE", set())
        if name == "batched in fp32":
            patch.setattr(forms, "_WITHOUT_FP64", {"cpu"})
        yield


class Looks(TorchDispatchMode):
    """What the host reads of tensors while it is active: the names of the operators, and of methods that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in LOOKS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_copies(seen: list[str]) -> Iterator[None]:
    """Note `cpu` and `numpy` of tensors, which on a CPU are no operators, in `seen`, where this thread calls them."""
    here = threading.get_ident()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cpu", "numpy", "tolist"):
            method = getattr(torch.Tensor, name)

            def noted(tensor: torch.Tensor, *rest: Any, name: str = name, method: Any = method, **more: Any) -> Any:
                if threading.get_ident() == here:
                    seen.append(name)
                return method(tensor, *rest, **more)

            patch.setattr(torch.Tensor, name, noted)
        yield
