"""The exact dictionary step in a metric: its equations couple the columns of the atoms, so the bank is solved whole."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute import ranks
from globe.compute.blocks import BLOCKS, Blocks
from globe.compute.forms import wide_dtype
from globe.compute.gemm import matmul, mixtures, scatter_add
from globe.compute.passes import Engine, engine, shifted, within
from globe.fit.dictionary import Equations, Solving, conjugate_gradients, left_blocks, mod_exact, ridged_start, spans
from globe.statistics.metric import Metric, by_runs, stacked

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
    size, first = min(blocks.experts, max(1, len(codes))), equations.first
    mixed, products, room = (torch.empty(size, *bank.shape[1:], device=bank.device) for _ in range(3))
    with engine(bank.device) as workers:
        moments = Moments(metric, workers)
        weights = np.zeros(len(metric.layers))
        weights[first : first + len(codes)] = (codes**2).sum(1) * traces
        columns = moments.inverse_columns(ranks.summed_array(weights), workers)
        means = moments.means[first : first + len(codes), None]
        inverse, shift, used = left_blocks(codes**2 * means, left_grams, how.ridge, workers)

        def operator(atoms: torch.Tensor) -> torch.Tensor:
            total = ridged_start(shift, atoms)
            for some in spans(len(codes), size):
                mixtures(codes[some], atoms, mixed)

                def apply(part: slice, some: slice = some) -> None:
                    mine = within(some, part)
                    products[part] = moments.apply(shifted(mine, first), matmul(left_grams[mine].float(), mixed[part]))

                workers.run(apply, some.stop - some.start)
                scatter_add(codes[some], products[: some.stop - some.start], total, room)
            return ranks.summed(total)

        def precondition(vector: torch.Tensor) -> torch.Tensor:
            found = torch.empty_like(vector)

            def solve(part: slice) -> None:
                found[part] = matmul(matmul(inverse[part], vector[part]), columns)

            workers.run(solve, len(vector))
            return found

        residual -= shift * bank
        change = conjugate_gradients(operator, precondition, residual, how.steps)
    change.mul_(1 + how.over_relaxation).mul_(used)
    return torch.add(bank, change, out=residual)


class Moments:
    """M_i = L_i L_iᵀ of every expert: S_i M_l S_i, or L_l R_i² L_lᵀ, with M_l = L_l L_lᵀ its layer's."""

    def __init__(self, metric: Metric, workers: Engine) -> None:
        self._metric = metric
        self._whole = metric.layer_moments(workers)
        self.means = self._means()

    def apply(self, some: slice, matrices: torch.Tensor) -> torch.Tensor:
        """X_i M_i for X (n, k, d)."""
        if self._metric.own is not None:
            return self._metric.unseen(some, self._metric.seen(some, matrices))

        def product(run: slice, found: torch.Tensor) -> torch.Tensor:
            layer, scales = self._metric.layers[run.start], self._metric.scales
            if layer is None:
                return found
            if scales is None:
                return matmul(found, self._whole[layer])
            mine = stacked(scales, run)[:, None]
            return matmul(found * mine, self._whole[layer]) * mine

        return by_runs(self._metric.layers[some], some, matrices, product)

    def _means(self) -> Array:
        """The mean diagonal of every M_i."""

        def means(run: slice, ones: torch.Tensor) -> torch.Tensor:
            layer, scales = self._metric.layers[run.start], self._metric.scales
            if layer is None:
                return ones
            diagonal = self._whole[layer].diagonal()
            if self._metric.own is not None:
                gains = self._metric.own.gains(run, self._metric.columns[layer])
                return diagonal.mean() + gains / len(diagonal)
            if scales is None:
                return ones * diagonal.mean()
            return (diagonal * stacked(scales, run).square()).mean(1)

        layers = self._metric.layers
        ones = torch.ones(len(layers), device=next(iter(self._whole.values())).device)
        found: Array = by_runs(layers, slice(0, len(layers)), ones, means).cpu().double().numpy()
        return found

    def inverse_columns(self, weights: Array, workers: Engine) -> torch.Tensor:
        """K⁻¹ (d, d), fp32, of K = Σ_i w_i M_i of mean diagonal one, damped; by fp64 Cholesky.

        That is done on the CPU where the device has no fp64: one matrix a step.
        """
        return next(workers.map(lambda _: self._inverse_columns(weights), 1))[1]

    def _inverse_columns(self, weights: Array) -> torch.Tensor:
        there = next(iter(self._whole.values())).device
        place = there if wide_dtype(there) == torch.float64 else torch.device("cpu")
        layers, scales, own = self._metric.layers, self._metric.scales, self._metric.own
        total: torch.Tensor | None = None
        for layer, whole in self._whole.items():
            numbers = [number for number, found in enumerate(layers) if found == layer]
            moment, shares = whole.to(place).double(), torch.from_numpy(weights[numbers]).to(place)
            if own is not None and layer is not None:
                factor = self._metric.columns[layer].to(place).double()
                moment = moment * shares.sum() + factor @ own.summed(numbers, shares) @ factor.mT
            elif scales is None:
                moment = moment * shares.sum()
            else:
                mine = torch.stack([scales[number] for number in numbers]).to(place).double()
                moment = moment * (mine.mT @ (shares[:, None] * mine))
            total = moment if total is None else total.add_(moment)
        assert total is not None, "no expert's columns are weighed"
        total.diagonal().add_(float(sum(weights[[layer is None for layer in layers]])))
        mean = total.diagonal().mean()
        one = torch.ones_like(mean)
        total = total / torch.where(mean > 0, mean, one)
        total.diagonal().add_(torch.where(mean > 0, _COLUMN_DAMPING * one, one))
        inverse: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky_ex(total)[0]).float()
        return inverse.to(there)
