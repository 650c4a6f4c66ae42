"""What a run hands down to all its stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globe.compute.blocks import Blocks
from globe.runs.stages import Stages
from globe.runs.store import Store
from globe.runs.turn import Turn
from globe.settings import Settings


@dataclass(frozen=True)
class Job:
    """A run: how it works, where, how much is in hand at a time, what it shows, and where its results are kept.

    Parameters
    ----------
    settings : Settings
    device : torch.device
        Where the large products run.
    blocks : Blocks
    stages : Stages
        Times what is done, and shows it.
    store : Store
        What a later process goes on from.
    turn : Turn, optional
        When a fit has to be done.
    """

    settings: Settings
    device: torch.device
    blocks: Blocks
    stages: Stages
    store: Store
    turn: Turn | None = None

    def log(self, line: str) -> None:
        """Show a line."""
        self.stages.display.log(line)
