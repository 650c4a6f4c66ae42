"""What a model's layers are called with beside the stream, and what each of them hands on to the next."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

HANDED = object()  # in the place of what the layer before gives beside the stream

Calls = list[dict[str, Any]]  # the arguments of every layer


class Arguments:
    """The arguments of every layer for a batch of windows, without the stream.

    Parameters
    ----------
    calls : mapping of int to list of dict
        By the first window of a batch, for each layer. Where a value is `HANDED`, it is what the layer before gave.
    """

    def __init__(self, calls: Mapping[int, Calls]) -> None:
        self._calls = calls
        self._handed: dict[tuple[int, int], Any] = {}

    @property
    def hands_on(self) -> bool:
        """Whether layers give anything beside the stream that the next is called with."""
        return any(value is HANDED for calls in self._calls.values() for call in calls for value in call.values())

    def of(self, number: int, span: slice) -> dict[str, Any]:
        """The arguments of a layer."""
        there = self._handed.get((number - 1, span.start))
        return {name: there if value is HANDED else value for name, value in self._calls[span.start][number].items()}

    def hand_on(self, number: int, span: slice, value: Any) -> None:
        """Keep what a layer gives beside the stream, if the next is called with it."""
        calls = self._calls[span.start]
        if number + 1 == len(calls) or all(value is not HANDED for value in calls[number + 1].values()):
            return
        self._handed[number, span.start] = value
        self._handed.pop((number - 2, span.start), None)

    def another(self) -> Arguments:
        """The same for another stream of the same windows."""
        return Arguments(self._calls)


def named(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments behind the first, by their names in a method of an object."""
    names = list(inspect.signature(function).parameters)[1:]
    return dict(zip(names, arguments, strict=False))


def shared(call: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments, each that equals one of another batch's being that one: masks are large."""
    return {name: _shared(value, before.get(name)) for name, value in call.items()}


def _shared(value: Any, before: Any) -> Any:
    if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
        return tuple(_shared(*pair) for pair in zip(value, before, strict=True))
    alike = isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor) and value.shape == before.shape
    return before if alike and torch.equal(value, before) else value
