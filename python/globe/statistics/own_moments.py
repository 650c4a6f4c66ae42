"""Second moments of every expert's own inputs, summed while a layer runs, and what they say beyond the layer's."""

from __future__ import annotations

import torch

from globe.compute import ranks
from globe.compute.passes import engine
from globe.statistics.grams import mirrored, upper_gram
from globe.statistics.shrinkage import Whitened


class OwnMoments:
    """Σ x xᵀ of every expert's tokens, those of every other stretch of the text apart; in fp32, where the layer runs.

    Parameters
    ----------
    experts, d : int
    kept : int
        Directions of every expert that are kept at the end; 0 to sum nothing.
    """

    def __init__(self, experts: int, d: int, kept: int) -> None:
        self.shape, self.kept = (2, experts, d, d), min(kept, d)
        self.totals: torch.Tensor | None = None

    def takes(self, choices: int, device: torch.device) -> bool:
        """Make room for inputs, unless every token goes to all experts: then they are the layer's for each of them."""
        if self.kept == 0 or choices >= self.shape[1]:
            return False
        if self.totals is None:
            self.totals = torch.zeros(self.shape, device=device)
        return True

    def add(self, expert: int, inputs: torch.Tensor, second: torch.Tensor) -> None:
        """Take inputs (n, d) of an expert, each times the root of its weight; and which (n,) are of the second half."""
        assert self.totals is not None, "add before there is room"
        for half in (0, 1):
            mine = inputs[second == half]
            if len(mine) > 0:
                self.totals[half, expert] += upper_gram(mine)

    def merge(self, other: OwnMoments) -> None:
        """Add the sums over other tokens."""
        if self.totals is None:
            self.totals = other.totals
        elif other.totals is not None:
            self.totals += other.totals.to(self.totals.device)

    def over_ranks(self) -> None:
        """Take the sums over the tokens of all ranks."""
        if any(ranks.gathered(self.totals is not None)):
            self.totals = ranks.summed(self.totals if self.totals is not None else torch.zeros(self.shape))

    def statistics(self, moment: torch.Tensor, halves: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """`own_directions`, `own_values` and `own_sizes` of `LayerStatistics`.

        Parameters
        ----------
        moment : torch.Tensor, shape (d, d), fp64
            The layer's.
        halves : torch.Tensor, shape (2, E), fp64
            Σ of the weights of both halves of every expert's tokens.
        counts : torch.Tensor, shape (E,)
            How many they are.

        Returns
        -------
        dict
            Empty where nothing was summed, or no expert's moment says anything that the layer's does not.
        """
        if self.totals is None:
            return {}
        totals, layer, (_, count, d, _) = self.totals, Whitened(moment), self.shape
        directions, values, sizes = torch.zeros(count, d, self.kept), torch.zeros(count, self.kept), torch.ones(count)

        def estimate(part: slice) -> None:
            for expert in range(part.start, part.stop):
                weights = halves[:, expert]
                scale = torch.where(weights > 0, 1 / weights, 0).float()
                means = mirrored(totals[:, expert].cpu()) * scale[:, None, None]
                found = layer.own(means, weights, int(counts[expert]), self.kept)
                if found is not None:
                    directions[expert], values[expert], sizes[expert] = found.directions, found.values, found.size

        with engine(torch.device("cpu")) as workers:
            workers.run(estimate, count)
        if not bool(values.any()):
            return {}
        return {"own_directions": directions, "own_values": values, "own_sizes": sizes}
