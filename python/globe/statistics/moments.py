"""Second moments of a mixture of experts, summed while a decoder layer runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from globe.compute import ranks
from globe.compute.passes import engine
from globe.statistics.calibration import MOMENTS, LayerStatistics
from globe.statistics.experts import FACTORS, Seen, row_blocks
from globe.statistics.grams import mirrored, upper_gram
from globe.statistics.own_moments import OwnMoments

_STRETCH = 128  # tokens


class Moments:
    """Sums of a layer's statistics over tokens: products in fp32 over the tokens of one call, sums of calls in fp64.

    Parameters
    ----------
    experts : int
        E.
    d, p : int
        The width of the layer's inputs, and of its experts.
    kept : sequence of str
        Which p × p moments are gathered too: names out of `MOMENTS`.
    own : int
        Directions of the experts' own d × d moments to keep; 0 to gather none.
    """

    def __init__(self, experts: int, d: int, p: int, kept: Sequence[str], own: int = 0) -> None:
        self.tokens = 0
        self.worth = 0.0
        self.moment = _zeros(d, d)  # its panels below the diagonal are zero, as those of `products`
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.halves = _zeros(2, experts)  # weights of the tokens, of every other stretch apart
        self.diagonals = _zeros(2, experts, d)
        self.squares = _zeros(experts, FACTORS, p)
        self.products = {name: _zeros(experts, p, p) for name in kept}
        self.own = OwnMoments(experts, d, own)

    def add(self, seen: Seen, stream: torch.Tensor, first: int) -> None:
        """Take a call of the layer's experts.

        Parameters
        ----------
        seen : Seen
        stream : torch.Tensor, shape (n, d)
            The residual stream behind the block.
        first : int
            The place of the first token in the text.
        """
        x, routing = seen.inputs.float(), seen.routing
        size = torch.linalg.vector_norm(stream.to(x.device).float(), dim=-1).square()
        worth = torch.where(size > 0, 1 / size, 0)
        places = torch.arange(first, first + len(x), device=x.device)
        self.tokens += len(x)
        self.worth += float(_double(worth).sum())
        self.moment += _double(upper_gram(x * worth.sqrt()[:, None]))
        roots = routing.weights * worth.index_select(0, routing.rows).sqrt()
        second = (places // _STRETCH % 2).float().index_select(0, routing.rows)
        halves = torch.stack((1 - second, second))
        gathers_own = self.own.takes(routing.places.shape[1], x.device)

        def add_expert(expert: int) -> None:
            span = routing.spans[expert]
            self.counts[expert] += span.stop - span.start
            for rows in row_blocks(span.start, span.stop, x.device):
                root = roots[rows, None]
                inputs = (x.index_select(0, routing.rows[rows]) * root).square_()
                self.halves[:, expert] += _double(halves[:, rows] @ root.square())[:, 0]
                self.diagonals[:, expert] += _double(halves[:, rows] @ inputs)
                self.squares[expert] += _double((seen.factors[:, rows] * root).square_().sum(1))
            if gathers_own:
                self.own.add(expert, x.index_select(0, routing.rows[span]) * roots[span, None], second[span])
            for name, total in self.products.items():
                factor = seen.factors[MOMENTS.index(name), span]
                if len(factor) > 0:
                    total[expert] += _double(upper_gram(factor * roots[span, None]))

        def add_experts(part: slice) -> None:
            for expert in range(part.start, part.stop):
                add_expert(expert)

        with engine(x.device) as workers:
            workers.run(add_experts, len(routing.spans))

    def merge(self, other: Moments) -> None:
        """Add the sums over other tokens of the same layer: those of all tokens are the sums of their parts.

        Raises
        ------
        ValueError
            If the other's are of another shape, or keep other moments.
        """
        mine, theirs = (
            [*shapes.diagonals.shape, *shapes.squares.shape, *shapes.products, shapes.own.kept]
            for shapes in (self, other)
        )
        if mine != theirs:
            raise ValueError(f"other: found sums of {theirs}; expected {mine}, as here")
        self.tokens += other.tokens
        self.worth += other.worth
        for name in ("moment", "counts", "halves", "diagonals", "squares"):
            getattr(self, name).add_(getattr(other, name))
        for name, total in self.products.items():
            total += other.products[name]
        self.own.merge(other.own)

    def over_ranks(self) -> Moments:
        """The sums over the tokens of all ranks."""
        tokens, worth = ranks.summed_array(np.array([self.tokens, self.worth]))
        self.tokens, self.worth = int(tokens), float(worth)
        for total in (self.moment, self.counts, self.halves, self.diagonals, self.squares, *self.products.values()):
            ranks.summed(total)
        self.own.over_ranks()
        return self

    def statistics(self, down: torch.Tensor) -> LayerStatistics:
        """The means over the tokens taken, with the down matrices (E, d, p)."""
        weight = self.halves.sum(0)
        scale = torch.where(weight > 0, 1 / weight, 0)
        gate, up, hidden = (self.squares * scale[:, None, None]).unbind(1)
        norms = torch.stack([_double(matrix.float()).square().sum(0) for matrix in down])
        moment = mirrored(self.moment) / self.worth
        return LayerStatistics(
            moment=moment.float(),
            residual=torch.tensor(self.tokens / self.worth, dtype=torch.float32),
            share=(weight / self.worth).float(),
            counts=self.counts,
            diagonal=self._own_diagonals(moment.diagonal()).float(),
            gate_rows=(gate * norms).float(),
            up_rows=(up * norms).float(),
            hidden=hidden.float(),
            **{name: self._row_moments(name, down, scale) for name in self.products},
            **self.own.statistics(moment, self.halves, self.counts),
        )

    def _row_moments(self, name: str, down: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        means = torch.empty(self.products[name].shape)
        for expert, total in enumerate(self.products[name]):
            mean = mirrored(total) * scale[expert]
            if name != "hidden_moment":
                matrix = _double(down[expert].float())
                mean *= matrix.T @ matrix
            means[expert] = mean
        return means

    def _own_diagonals(self, common: torch.Tensor) -> torch.Tensor:
        """E[x∘x] of every expert's tokens; `common` where half of the tokens tell less of the other half than it."""
        means = torch.where(self.halves > 0, 1 / self.halves, 0)[..., None] * self.diagonals
        weights = torch.where(common > 0, 1 / common, 0)
        apart = ((means[0] - means[1]) * weights).square().sum(1)
        away = ((means - common) * weights).square().sum(2).mean(0)
        believed = (self.halves > 0).all(0) & (apart < away)
        whole = self.diagonals.sum(0) / self.halves.sum(0)[:, None]
        return torch.where(believed[:, None], whole, common)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.cpu().double()
