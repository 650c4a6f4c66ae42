"""What a sweep's experts, mixtures, targets and bank look like through a metric, or as they are without one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute.forms import per_core
from globe.compute.gemm import bank_gram, grams, matmul
from globe.compute.passes import Engine
from globe.settings import Settings
from globe.sizes.budget import SEEN_GRAM_BYTES
from globe.statistics.metric import Metric

Array = NDArray[np.float64]
_GRAM_PARTS = 8  # blocks of columns of a layer's Gram: for the workers, and to pass over the zeros of a triangular L


class Sight:
    """How one sweep sees a bank (m, r, d) and its experts.

    Coding is argmin over α_i of ‖(T_i − Σ_j α_ij B_j) L_l‖², T_i = (D_i A_i)⁺ D_i W_i, with L_l the layer's: what
    `Metric` adds for each expert would take a Gram for each, and is left out of Gram and correlations alike.
    With `mod: fixed` the targets are proxies and coding is not weighed.
    """

    def __init__(self, bank: torch.Tensor, metric: Metric | None, settings: Settings) -> None:
        self.metric = metric
        self._bank = bank
        self._coded = metric if settings.mod != "fixed" else None
        self._exact = settings.mod == "exact"
        self._grams: dict[int | None, Array] = {}

    def look(self, some: slice, weights: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """D_i W_i L_i (n, p, d) and B̃_i L_i (n, r, d), from W_i in the checkpoint's dtype and B̃_i."""
        if self.metric is None:
            return weights.float(), mixed
        return self.metric.weigh(some, weights.float()), self.metric.seen(some, mixed)

    def aim(
        self, some: slice, transposed: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor, seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is correlated with the bank, and what the dictionary step sums, both (n, r, d).

        Without a metric T_i, and A_iᵀW_i (`exact`) or T_i. With one T_i L_l L_lᵀ, and A'_iᵀ W'_i L_iᵀ or T_i.

        Parameters
        ----------
        some : slice
        transposed : torch.Tensor, shape (n, r, p)
            A'_iᵀ = (D_i A_i)ᵀ, columns of held-out rows being zero.
        inverse : torch.Tensor, shape (n, r, r)
            Of A'_iᵀA'_i.
        weights, seen : torch.Tensor, shape (n, p, d)
            W_i, and what `look` made of it.
        """
        metric = self.metric
        if metric is None or (self._exact and metric.shared):
            moved = matmul(transposed, seen)
            if metric is not None:  # the factor on the left commutes with what is done to the columns
                moved = metric.unseen(some, moved)
            target = matmul(inverse, moved)
            return target, moved if self._exact else target
        plain = matmul(transposed, metric.weigh_rows(some, weights.float()))
        target = matmul(inverse, plain)
        summand = metric.unseen(some, metric.seen(some, plain)) if self._exact else target
        return metric.common(some, target), summand

    def fitted(self, some: slice, matrices: torch.Tensor) -> torch.Tensor:
        """X_i L_i L_iᵀ: A'_iᵀA'_i B̃_i as the normal equations have it."""
        return matrices if self.metric is None else self.metric.unseen(some, self.metric.seen(some, matrices))

    def grams(self, span: slice, workers: Engine) -> Iterator[tuple[slice, Array]]:
        """⟨B_j L_l, B_k L_l⟩ for runs of experts of one layer; two are kept: the plain one and the last."""
        first = span.start
        while first < span.stop:
            layer, last = self._layer(first), first + 1
            while last < span.stop and self._layer(last) == layer:
                last += 1
            yield slice(first, last), self._gram(layer, workers)
            first = last

    def _layer(self, number: int) -> int | None:
        return None if self._coded is None else self._coded.layers[number]

    def _gram(self, layer: int | None, workers: Engine) -> Array:
        if layer not in self._grams:
            self._grams = {key: gram for key, gram in self._grams.items() if key is None}
            if layer is None or self._coded is None:
                self._grams[layer] = bank_gram(self._bank)
            else:
                self._grams[layer] = seen_gram(self._bank, self._coded.columns[layer], workers)
        return self._grams[layer]


def seen_gram(bank: torch.Tensor, factor: torch.Tensor, workers: Engine) -> Array:
    """⟨B_j L, B_k L⟩ for all atoms, by blocks of columns of L (d, d); zeros above the diagonal of L are passed over."""
    atoms, rank, width = bank.shape
    size = max(1, min(-(-width // _GRAM_PARTS), SEEN_GRAM_BYTES // (4 * atoms * rank)))
    starts = range(0, width, size)
    lower = per_core(bank.device) and not bool(factor.triu(1).any())
    flat = bank.view(atoms * rank, width)

    def summed(part: slice) -> torch.Tensor:
        products = []
        for start in starts[part]:
            begin = start if lower else 0
            product = matmul(flat[:, begin:], factor[begin:, start : start + size])
            products.append(grams(product.view(1, atoms, -1))[0])
        return torch.stack(products).sum(0)

    total = sum(found for _, found in workers.map(summed, len(starts)))
    assert isinstance(total, torch.Tensor)
    found: Array = total.cpu().double().numpy()
    return found
