"""What a healing is told: how long, what moves, how fast, on which text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from globe.errors import UsageError

PARTS = ("lefts", "norms", "down")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Healing:
    """Options of `globe.heal`.

    Attributes
    ----------
    text : tuple of Path
        UTF-8 files to learn on; with none, the calibration halves of Python's help topics, sources and licence.
    own_tokens : int
        Tokens that the original samples itself, at temperature 1; 0 for none.
    text_tokens : int
        Most tokens of each text, in windows that are spread evenly over it.
    minutes : float
        How long it may take, sampling included; what a stopped run has used counts.
    steps : int, optional
        Take so many steps instead, whatever they take: the result then follows from the options alone.
    parts : tuple of str
        What moves: "lefts", the left factors; "norms", the norms' scales; "down", where it is dense.
    rate : float
        Learning rate, as a share of a tensor's own root mean square.
    batch, window : int
        Windows in a step and tokens in a window.
    seed : int
        Of the samples and the order of the windows.
    precision : {"auto", "fp32", "bf16"}
        What both models compute in. What moves is kept in fp32, and the KL is computed in it. auto: bf16 where the
        checkpoint is in bf16 and the device has fast products of it.
    layers_at_a_time : int, optional
        Groups of so many layers take turns, so that gradients and Adam's moments are of one group only; by default all
        layers move together.
    """

    text: tuple[Path, ...] = ()
    own_tokens: int = 16384
    text_tokens: int = 24576
    minutes: float = 20.0
    steps: int | None = None
    parts: tuple[str, ...] = ("lefts", "norms")
    rate: float = 2e-4
    batch: int = 2
    window: int = 256
    seed: int = 0
    precision: str = "auto"
    layers_at_a_time: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("own_tokens", 0), ("text_tokens", 1), ("batch", 1), ("window", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("steps", "layers_at_a_time"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("minutes", "rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UsageError(f"{name} is {getattr(self, name)}; expected a positive number")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise UsageError(f"parts are {','.join(self.parts) or 'none'}; expected some of {', '.join(PARTS)}")

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values."""
        return {**asdict(self), "text": [str(path) for path in self.text], "parts": list(self.parts)}
