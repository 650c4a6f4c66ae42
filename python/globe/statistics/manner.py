"""How statistics are measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OwnPlan:
    """How many directions of each expert's own moment are kept, and why none are where they are not gathered."""

    directions: int
    why_not: str | None = None


@dataclass(frozen=True)
class FisherPlan:
    """From how many tokens the Fisher information is found at most, and why from none."""

    tokens: int
    why_not: str | None = None


NOT_ASKED = FisherPlan(0, "not asked for")


@dataclass(frozen=True)
class Manner:
    """How statistics are measured.

    Parameters
    ----------
    device : torch.device
        Where layers run.
    kept : tuple of str
        Which p × p moments are gathered: names out of `MOMENTS`.
    precision : str
        ``auto``: in bf16 on a CPU that has such products, of a checkpoint in bf16; anything else: in fp32 on a CPU.
    own : OwnPlan
        What of the experts' own d × d moments is.
    fisher : FisherPlan
        How the Fisher information of the experts' products is found.
    """

    device: torch.device
    kept: tuple[str, ...]
    precision: str
    own: OwnPlan
    fisher: FisherPlan
