"""The exact dictionary step in a metric: its equations couple the columns of the atoms, so the bank is solved whole."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute.blocks import BLOCKS, Blocks
from globe.compute.gemm import matmul, mixtures, scatter_add
from globe.compute.stream import Workers
from globe.fit.dictionary import Equations, Solving, conjugate_gradients, left_blocks, mod_exact, spans
from globe.statistics.metric import Metric

Array = NDArray[np.float64]
_COLUMN_DAMPING = 1e-3  # of the mean diagonal, which is one


def mod_metric(
    equations: Equations, bank: torch.Tensor, metric: Metric, how: Solving, blocks: Blocks = BLOCKS
) -> torch.Tensor:
    """B = argmin Σ_i ‖D_i W_i L_i − A_i Σ_j α_ij B_j L_i‖² + Σ_j λ_j ‖B_j‖², by preconditioned CG from `bank`.

    The normal equations are Σ_i α_ij C_i (Σ_k α_ik B_k) M_i + λ_j B_j = Σ_i α_ij A_iᵀ D_i W_i M_i with
    C_i = A_iᵀA_i and M_i = L_i L_iᵀ. The block of an atom is Σ_i α_ij² C_i ⊗ M_i; the preconditioner takes it for
    (Σ_i α_ij² t_i C_i + λ_j I) ⊗ K with t_i the mean diagonal of M_i and K = Σ_i w_i M_i of mean diagonal one, w_i in
    proportion to Σ_j α_ij² tr C_i (a K of every atom's own gains next to nothing). Needs no pass over W. Where no
    column is weighed this is :func:`globe.fit.dictionary.mod_exact`.

    Parameters
    ----------
    equations : Equations
        Of D_i A_i: `left_grams` are C_i, the residual is Σ_i α_ij (A_iᵀ D_i W_i − C_i Σ_k α_ik B_k) M_i.
    bank : torch.Tensor, shape (m, r, d), fp32
    metric : Metric
        L_i.
    how : Solving
        λ_j is `how.ridge` times the mean diagonal of Σ_i α_ij² t_i C_i.
    blocks : Blocks
        `experts` in hand at a time.
    """
    if not metric.columns:
        return mod_exact(equations, bank, how, blocks)
    codes, left_grams, residual = equations.codes, equations.left_grams, equations.residual
    traces = left_grams.diagonal(dim1=1, dim2=2).float().sum(1).cpu().double().numpy()
    size = min(blocks.experts, len(codes))
    mixed, products, room = (torch.empty(size, *bank.shape[1:], device=bank.device) for _ in range(3))
    with Workers(bank.device) as workers:
        moments = Moments(metric, workers)
        columns = moments.inverse_columns((codes**2).sum(1) * traces, workers)
        inverse, shift, used = left_blocks(codes**2 * moments.means[:, None], left_grams, how.ridge)

        def operator(atoms: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = shift * atoms
            for some in spans(len(codes), size):
                mixtures(codes[some], atoms, mixed)

                def apply(k: int, first: int = some.start) -> None:
                    products[k] = moments.apply(first + k, matmul(left_grams[first + k].float(), mixed[k]))

                for _ in workers.map(apply, some.stop - some.start):
                    pass
                scatter_add(codes[some], products[: some.stop - some.start], total, room)
            return total

        def precondition(vector: torch.Tensor) -> torch.Tensor:
            found = torch.empty_like(vector)

            def solve(j: int) -> None:
                found[j] = matmul(matmul(inverse[j], vector[j]), columns)

            for _ in workers.map(solve, len(vector)):
                pass
            return found

        residual -= shift * bank
        change = conjugate_gradients(operator, precondition, residual, how.steps)
    change.mul_(1 + how.over_relaxation).mul_(used)
    return torch.add(bank, change, out=residual)


class Moments:
    """M_i = L_i L_iᵀ of every expert: S_i M_l S_i with M_l its layer's and S_i its scale."""

    def __init__(self, metric: Metric, workers: Workers) -> None:
        self._metric = metric
        factors = list(metric.columns.values())
        products = workers.map(lambda k: matmul(factors[k], factors[k].mT), len(factors))
        self._whole = dict(zip(metric.columns, products, strict=True))
        self.means = np.array([self._mean(number) for number in range(len(metric.layers))])

    def apply(self, number: int, matrix: torch.Tensor) -> torch.Tensor:
        """X M_i."""
        layer, scale = self._metric.layers[number], self._scale(number)
        if layer is None:
            return matrix
        if scale is None:
            return matmul(matrix, self._whole[layer])
        return matmul(matrix * scale, self._whole[layer]) * scale

    def _scale(self, number: int) -> torch.Tensor | None:
        return None if self._metric.scales is None else self._metric.scales[number]

    def _mean(self, number: int) -> float:
        layer, scale = self._metric.layers[number], self._scale(number)
        if layer is None:
            return 1.0
        diagonal = self._whole[layer].diagonal()
        return float((diagonal if scale is None else diagonal * scale.pow(2)).mean())

    def inverse_columns(self, weights: Array, workers: Workers) -> torch.Tensor:
        """K⁻¹ (d, d), fp32, of K = Σ_i w_i M_i of mean diagonal one, damped; by fp64 Cholesky on the CPU."""
        return next(workers.map(lambda _: self._inverse_columns(weights), 1))

    def _inverse_columns(self, weights: Array) -> torch.Tensor:
        total: torch.Tensor | None = None
        for layer, whole in self._whole.items():
            numbers = [number for number, found in enumerate(self._metric.layers) if found == layer]
            moment = whole.cpu().double()
            shares = torch.from_numpy(weights[numbers])
            if self._metric.scales is None:
                moment = moment * shares.sum()
            else:
                scales = torch.stack([self._metric.scales[number].cpu().double() for number in numbers])
                moment = moment * (scales.mT @ (shares[:, None] * scales))
            total = moment if total is None else total.add_(moment)
        assert total is not None, "no expert's columns are weighed"
        plain = float(sum(weight for weight, layer in zip(weights, self._metric.layers, strict=True) if layer is None))
        total.diagonal().add_(plain)
        mean = float(total.diagonal().mean())
        total /= mean if mean > 0 else 1.0
        total.diagonal().add_(_COLUMN_DAMPING if mean > 0 else 1.0)
        inverse: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky(total)).float()
        return inverse.to(next(iter(self._whole.values())).device)
