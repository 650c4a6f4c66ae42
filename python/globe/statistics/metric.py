"""The metric of a fit: how much an error of each expert's rows and columns matters to the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch

from globe.checkpoint.family import Expert, Family
from globe.checkpoint.powers import times_power, usual_exponent
from globe.compute.forms import per_core
from globe.compute.gemm import matmul, times_lower, times_upper
from globe.compute.passes import Engine
from globe.settings import Settings
from globe.statistics.calibration import Calibration, LayerStatistics
from globe.statistics.own_columns import OwnColumns
from globe.statistics.shrinkage import DAMPING, damped_factor

_ALIKE = 1e-3
_LEAST_ROW = 1e-4  # of the mean weight
_PRIOR = 64.0  # tokens


@dataclass(frozen=True)
class Metric:
    """Σ_i ‖D_i (W_i − Ŵ_i) L_i‖² for the experts of a pool: what their errors cost the model.

    Every W_i, and B̃_i, is seen through it: D_i W_i L_i ≈ (D_i A_i) (B̃_i L_i) is a plain least squares problem, and
    the left factor does not depend on D_i.

    Parameters
    ----------
    rows : torch.Tensor, or tuple of torch.Tensor
        D_i of every expert: (p,) for a diagonal one, or (p, p); stacked where all are of one kind.
    columns : dict of int to torch.Tensor, shape (d, d)
        L of a layer, L Lᵀ the damped second moment of its inputs.
    scales : torch.Tensor, shape (N, d), or tuple of its rows, or None
        What the rows of L are multiplied by for each expert, for its own share of the inputs.
    layers : tuple of int or None
        The layer of every expert; None where its columns are not weighed.
    exponent : int
        The power of two that all D_i were divided by, to be of a usual size.
    own : OwnColumns or None
        R_i: L_i = L R_i; there are no scales then.

    Methods take the experts' numbers as a slice, and matrices of as many of them, (n, k, d) in fp32; experts of one
    layer that follow each other share one product.
    """

    rows: torch.Tensor | tuple[torch.Tensor, ...]
    columns: dict[int, torch.Tensor]
    scales: torch.Tensor | tuple[torch.Tensor, ...] | None
    layers: tuple[int | None, ...]
    exponent: int = 0
    own: OwnColumns | None = None

    def seen(self, some: slice, matrices: torch.Tensor) -> torch.Tensor:
        """X_i L_i: mixtures as the fit sees them."""

        def product(run: slice, found: torch.Tensor) -> torch.Tensor:
            factor, scales = self._columns(run)
            if factor is None:
                return found
            scaled = found if scales is None else found * scales[:, None]
            whitened = times_lower(scaled, factor) if self._is_lower(run) else matmul(scaled, factor)
            return whitened if self.own is None else self.own.times(run, whitened)

        return by_runs(self.layers[some], some, matrices, product)

    def unseen(self, some: slice, gradients: torch.Tensor) -> torch.Tensor:
        """G_i L_iᵀ, the adjoint of `seen`."""

        def product(run: slice, found: torch.Tensor) -> torch.Tensor:
            factor, scales = self._columns(run)
            if factor is None:
                return found
            turned = found if self.own is None else self.own.times(run, found)
            moved = times_upper(turned, factor) if self._is_lower(run) else matmul(turned, factor.mT)
            return moved if scales is None else moved * scales[:, None]

        return by_runs(self.layers[some], some, gradients, product)

    def layer_moments(self, workers: Engine) -> dict[int | None, torch.Tensor]:
        """L Lᵀ (d, d) of every layer."""
        factors = list(self.columns.values())

        def squares(part: slice) -> list[torch.Tensor]:
            return [matmul(factor, factor.mT) for factor in factors[part]]

        products = (product for _, found in workers.map(squares, len(factors)) for product in found)
        return dict(zip(self.columns, products, strict=True))

    def moment(
        self, some: slice, width: int, known: Mapping[int | None, torch.Tensor] = MappingProxyType({})
    ) -> torch.Tensor:
        """L_i L_iᵀ (n, d, d), d being the `width`, with what is `known` of `layer_moments`."""

        def product(run: slice, places: torch.Tensor) -> torch.Tensor:
            factor, scales = self._columns(run)
            if factor is None:
                return torch.eye(width, device=places.device).expand(len(places), -1, -1)
            layer = self.layers[run.start]
            whole = (known[layer] if layer in known else matmul(factor, factor.mT)).expand(len(places), -1, -1)
            if self.own is not None:
                whole = whole + self.own.beyond(run, factor)
            return whole if scales is None else whole * scales[:, :, None] * scales[:, None]

        places = torch.empty(some.stop - some.start, device=self.rows[some.start].device)
        return by_runs(self.layers[some], some, places, product)

    def common(self, some: slice, matrices: torch.Tensor) -> torch.Tensor:
        """X_i L Lᵀ with the layer's own L, the same for all its experts."""

        def product(run: slice, found: torch.Tensor) -> torch.Tensor:
            factor, _ = self._columns(run)
            return found if factor is None else matmul(matmul(found, factor), factor.mT)

        return by_runs(self.layers[some], some, matrices, product)

    @property
    def shared(self) -> bool:
        """Whether all experts of a layer have the layer's own L."""
        return self.scales is None and self.own is None

    @property
    def mixes_rows(self) -> bool:
        """Whether any D_i is not diagonal: then no row can be held out."""
        return any(rows.ndim > 1 for rows in self.rows)

    def weigh(self, some: slice, weights: torch.Tensor) -> torch.Tensor:
        """D_i W_i L_i of the experts' matrices W_i (n, p, d)."""
        return self.weigh_rows(some, self.seen(some, weights))

    def weigh_rows(self, some: slice, matrices: torch.Tensor) -> torch.Tensor:
        """D_i X_i for X_i (n, p, k)."""

        def product(run: slice, found: torch.Tensor) -> torch.Tensor:
            rows = stacked(self.rows, run)
            return found * rows[:, :, None] if rows.ndim == 2 else matmul(rows, found)

        return by_runs([self.rows[number].ndim for number in range(some.start, some.stop)], some, matrices, product)

    def _is_lower(self, run: slice) -> bool:
        """Whether L is known to be lower triangular; only asked where the host may look."""
        return per_core(self.rows[run.start].device) and self._lower[self.layers[run.start]]

    @cached_property
    def _lower(self) -> dict[int | None, bool]:
        """Whether L of a layer is lower triangular, as a Cholesky factor is."""
        return {layer: not bool(factor.triu(1).any()) for layer, factor in self.columns.items()}

    def _columns(self, run: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """L of a run of experts of one layer, and their scales (n, d)."""
        layer = self.layers[run.start]
        if layer is None:
            return None, None
        return self.columns[layer], None if self.scales is None else stacked(self.scales, run)


def stacked(tensors: torch.Tensor | tuple[torch.Tensor, ...], some: slice) -> torch.Tensor:
    """The tensors of some experts, which are of one shape, in one."""
    return tensors[some] if isinstance(tensors, torch.Tensor) else torch.stack(tensors[some])


def by_runs(
    kinds: Sequence[int | None],
    some: slice,
    matrices: torch.Tensor,
    make: Callable[[slice, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What is made of the experts' matrices, a run of experts of one kind (n of them) at a time."""
    ends = [place for place in range(1, len(kinds)) if kinds[place] != kinds[place - 1]] + [len(kinds)]
    if len(ends) == 1:
        return make(some, matrices)
    runs = zip([0, *ends[:-1]], ends, strict=True)
    return torch.cat([make(slice(some.start + a, some.start + b), matrices[a:b]) for a, b in runs])


def build_metric(family: Family, calibration: Calibration, settings: Settings, device: torch.device) -> Metric:
    """The metric of a pool from activation statistics.

    Columns of gate and up: the second moments of the layer's inputs, per expert with what the calibration says of its
    own tokens; where that is a diagonal alone, (n_e diag_e + κ diag) / (n_e + κ) with κ = `metric_shrinkage`. Rows of
    gate and up: the Fisher information of the products. Rows of down (which is taken transposed): E[h hᵀ]; its columns:
    the Fisher information of the layer's output.

    With `metric: residual`, or without Fisher information, rows of gate and up are weighed by what an error there does
    to the expert's output, through the other product, the activation and the column of down; down has no columns; and
    layers by the output's error relative to the residual stream behind it, to the power `metric_layers`; 0 gives every
    layer the error of its own output.

    Raises
    ------
    GlobeError
        If the calibration has no statistics of a layer.
    """
    columns: dict[int, torch.Tensor] = {}
    rows: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    own: OwnColumns | None = None
    layers: list[int | None] = []
    number, statistics = -1, None
    for expert in family.experts:
        if statistics is None or expert.layer != number:
            number, statistics = expert.layer, calibration.layer(expert.layer)
        by_loss = settings.metric == "fisher" and statistics.gate_fisher is not None
        moment = statistics.output_fisher if expert.family == "down" else statistics.moment
        moment = moment if by_loss or expert.family != "down" else None
        if moment is not None and number not in columns:
            columns[number] = damped_factor(moment).to(device)
        layers.append(number if moment is not None else None)
        rows.append(_rows(statistics, expert, settings, by_loss).to(device))
        if expert.family == "down":
            scales.append(torch.ones(family.d, device=device))
        else:
            scales.append(_scale(statistics, expert.expert, settings.metric_shrinkage).to(device))
            own = _set_own(own, (len(layers) - 1, len(family)), statistics, expert.expert, device)
    alike = own is not None or all(bool((scale - 1).abs().max() < _ALIKE) for scale in scales)
    exponent = _exponent(rows)
    rows = [times_power(factor, -exponent) for factor in rows]
    scaled = None if alike else _together(scales)
    return Metric(_together(rows), columns, scaled, tuple(layers), exponent, own)


def _together(tensors: list[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The tensors of a list in one if they are of one shape; each of the list's is let go of as it is copied."""
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        return tuple(tensors)
    found = torch.empty(len(tensors), *tensors[0].shape, device=tensors[0].device)
    for place in reversed(range(len(tensors))):
        found[place] = tensors.pop()
    return found


def _exponent(rows: list[torch.Tensor]) -> int:
    """The power of two of the largest number in any D_i, unless that is of a usual size."""
    return usual_exponent(math.frexp(max(float(factor.abs().max()) for factor in rows))[1])


_DIAGONALS: Mapping[str, Callable[[LayerStatistics], torch.Tensor]] = {
    "gate": lambda found: found.gate_rows,
    "up": lambda found: found.up_rows,
    "down": lambda found: found.hidden,
}


def _rows(statistics: LayerStatistics, expert: Expert, settings: Settings, by_loss: bool) -> torch.Tensor:
    """D_i: by the Fisher information of the expert's products, or by their effect beside the residual stream."""
    share = statistics.share[expert.expert].clamp(min=1e-6)
    size = torch.ones(())
    if expert.family != "down" and statistics.own_sizes is not None:
        size = statistics.own_sizes[expert.expert]
    if not by_loss:
        weight = share * statistics.residual**-settings.metric_layers * size
        return _row_factor(statistics, expert.family, expert.expert, settings) * weight.sqrt()
    if expert.family == "down":
        return _row_factor(statistics, "down", expert.expert, settings) * share.sqrt()
    return (_fisher_rows(statistics, expert) * size).sqrt()


def _fisher_rows(statistics: LayerStatistics, expert: Expert) -> torch.Tensor:
    """E[δ_k²] of an expert's rows, with what their effect on its output says as that of a few tokens more.

    Ones where fp32 holds nothing of any in the layer.
    """
    found, counts = getattr(statistics, f"{expert.family}_fisher").double(), statistics.fisher_counts
    assert counts is not None
    effect = _DIAGONALS[expert.family](statistics).double() * statistics.share.double()[:, None]
    if not bool(found.any()):
        return torch.ones(found.shape[1])
    effect *= found.sum() / effect.sum().clamp(min=torch.finfo(torch.float64).tiny)
    count = float(counts[expert.expert])
    rows = (count * found[expert.expert] + _PRIOR * effect[expert.expert]) / (count + _PRIOR)
    floored: torch.Tensor = rows.clamp(min=_LEAST_ROW * float(found.mean()))
    return floored.float()


def _row_factor(statistics: LayerStatistics, family: str, expert: int, settings: Settings) -> torch.Tensor:
    """D_i but for the expert's weight; that of the layer's mean where the router sends the expert nothing."""
    if family == "down" and statistics.hidden_moment is not None:
        moments = statistics.hidden_moment
        moment = moments[expert] if bool(moments[expert].diagonal().any()) else moments.mean(0)
        return damped_factor(moment).mT.contiguous()
    power = settings.metric_rows
    diagonals = _DIAGONALS[family](statistics).double()
    diagonal = diagonals[expert] if bool(diagonals[expert].any()) else diagonals.mean(0)
    floor = _LEAST_ROW * float(diagonal.mean())
    if floor <= 0:
        return torch.ones_like(diagonal).float()
    return (diagonal.clamp(min=floor) ** (power / 2)).float()


def _scale(statistics: LayerStatistics, expert: int, shrinkage: float) -> torch.Tensor:
    """Square roots of the expert's own diagonal over the layer's, shrunk towards one."""
    common = statistics.moment.diagonal().double()
    own = statistics.diagonal[expert].double()
    count = float(statistics.counts[expert])
    floor = DAMPING * common.mean()
    if floor <= 0 or count + shrinkage <= 0:
        return torch.ones_like(common).float()
    shrunk = (count * (own + floor) + shrinkage * (common + floor)) / (count + shrinkage)
    return (shrunk / (common + floor)).sqrt().float()


def _set_own(
    own: OwnColumns | None, place: tuple[int, int], statistics: LayerStatistics, expert: int, device: torch.device
) -> OwnColumns | None:
    """The experts' own columns with those of one more, `place` being its number and how many there are."""
    if statistics.own_directions is None or statistics.own_values is None:
        return own
    number, count = place
    directions, values = statistics.own_directions[expert], statistics.own_values[expert]
    if own is None:
        shapes = (count, *directions.shape), (count, *values.shape)
        own = OwnColumns(*(torch.zeros(shape, device=device) for shape in shapes))
    own.directions[number], own.values[number] = directions, values
    return own
