"""The metric of a fit: how much an error of each expert's rows and columns matters to the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from globe.checkpoint.family import Family
from globe.checkpoint.powers import times_power, usual_exponent
from globe.compute.gemm import matmul
from globe.compute.spd import ridged_factor
from globe.settings import Settings
from globe.statistics.calibration import Calibration, LayerStatistics

_ALIKE = 1e-3
_LEAST_ROW = 1e-4  # of the mean weight
_DAMPING = 1e-3  # of the mean diagonal: inputs that the text never shows stay worth something


@dataclass(frozen=True)
class Metric:
    """Σ_i ‖D_i (W_i − Ŵ_i) L_i‖² for the experts of a pool: the squared error of the residual stream relative to it.

    Every W_i, and B̃_i, is seen through it: D_i W_i L_i ≈ (D_i A_i) (B̃_i L_i) is a plain least squares problem, and
    the left factor does not depend on D_i.

    Parameters
    ----------
    rows : tuple of torch.Tensor
        D_i of every expert: (p,) for a diagonal one, or (p, p).
    columns : dict of int to torch.Tensor, shape (d, d)
        L of a layer, L Lᵀ the damped second moment of its inputs.
    scales : tuple of torch.Tensor, shape (d,), or None
        What the rows of L are multiplied by for each expert, for its own share of the inputs.
    layers : tuple of int or None
        The layer of every expert; None where its columns are not weighed.
    exponent : int
        The power of two that all D_i were divided by, to be of a usual size.
    """

    rows: tuple[torch.Tensor, ...]
    columns: dict[int, torch.Tensor]
    scales: tuple[torch.Tensor, ...] | None
    layers: tuple[int | None, ...]
    exponent: int = 0

    def seen(self, number: int, matrix: torch.Tensor) -> torch.Tensor:
        """X L_i of the expert, for X (k, d) in fp32: a mixture as the fit sees it."""
        factor = self._factor(number)
        return matrix if factor is None else matmul(matrix, factor)

    def unseen(self, number: int, gradient: torch.Tensor) -> torch.Tensor:
        """G L_iᵀ, the adjoint of `seen`."""
        factor = self._factor(number)
        return gradient if factor is None else matmul(gradient, factor.mT)

    def moment(self, number: int, width: int) -> torch.Tensor:
        """L_i L_iᵀ (d, d), d being the `width`."""
        factor = self._factor(number)
        if factor is None:
            return torch.eye(width, device=self.rows[number].device)
        return matmul(factor, factor.mT)

    def common(self, number: int, matrix: torch.Tensor) -> torch.Tensor:
        """X L Lᵀ with the layer's own L, the same for all its experts."""
        layer = self.layers[number]
        return matrix if layer is None else matmul(matmul(matrix, self.columns[layer]), self.columns[layer].mT)

    @property
    def mixes_rows(self) -> bool:
        """Whether any D_i is not diagonal: then no row can be held out."""
        return any(rows.ndim > 1 for rows in self.rows)

    def weigh(self, number: int, weights: torch.Tensor) -> torch.Tensor:
        """D_i W L_i of the expert's matrix W (p, d) in fp32."""
        return self.weigh_rows(number, self.seen(number, weights))

    def weigh_rows(self, number: int, matrix: torch.Tensor) -> torch.Tensor:
        """D_i X for X (p, k)."""
        rows = self.rows[number]
        return matrix * rows[:, None] if rows.ndim == 1 else matmul(rows, matrix)

    def _factor(self, number: int) -> torch.Tensor | None:
        layer = self.layers[number]
        if layer is None:
            return None
        factor = self.columns[layer]
        return factor if self.scales is None else self.scales[number][:, None] * factor


def build_metric(family: Family, calibration: Calibration, settings: Settings, device: torch.device) -> Metric:
    """The metric of a pool from activation statistics.

    Columns of gate and up: the second moments of the layer's inputs, per expert with the diagonal of its own tokens
    where there are enough, (n_e diag_e + κ diag) / (n_e + κ) with κ = `metric_shrinkage`. Rows of gate and up: what
    an error there does to the expert's output, through the other product, the activation and the column of down. Rows
    of down (which is taken transposed): E[h hᵀ]. Layers: the output's error relative to the residual stream behind it,
    to the power `metric_layers`; 0 gives every layer the error of its own output.

    Raises
    ------
    GlobeError
        If the calibration has no statistics of a layer.
    """
    columns: dict[int, torch.Tensor] = {}
    rows: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    layers: list[int | None] = []
    number, statistics = -1, None
    for expert in family.experts:
        if statistics is None or expert.layer != number:
            number, statistics = expert.layer, calibration.layer(expert.layer)
        weighed = expert.family != "down"
        if weighed and number not in columns:
            columns[number] = _factor(statistics.moment).to(device)
        layers.append(number if weighed else None)
        weight = statistics.share[expert.expert].clamp(min=1e-6) * statistics.residual**-settings.metric_layers
        rows.append((_row_factor(statistics, expert.family, expert.expert, settings) * weight.sqrt()).to(device))
        scales.append(_scale(statistics, expert.expert, settings.metric_shrinkage).to(device))
    alike = all(bool((scale - 1).abs().max() < _ALIKE) for scale in scales)
    exponent = _exponent(rows)
    divided = tuple(times_power(factor, -exponent) for factor in rows)
    return Metric(divided, columns, None if alike else tuple(scales), tuple(layers), exponent)


def _exponent(rows: list[torch.Tensor]) -> int:
    """The power of two of the largest number in any D_i, unless that is of a usual size."""
    return usual_exponent(math.frexp(max(float(factor.abs().max()) for factor in rows))[1])


def _factor(moment: torch.Tensor) -> torch.Tensor:
    """L of the damped moment; of one near the end of fp32, which its rounding may leave indefinite, too."""
    return ridged_factor(moment.double(), _DAMPING).float()


_DIAGONALS: Mapping[str, Callable[[LayerStatistics], torch.Tensor]] = {
    "gate": lambda found: found.gate_rows,
    "up": lambda found: found.up_rows,
    "down": lambda found: found.hidden,
}


def _row_factor(statistics: LayerStatistics, family: str, expert: int, settings: Settings) -> torch.Tensor:
    """D_i but for the expert's weight; that of the layer's mean where the router sends the expert nothing."""
    if family == "down" and statistics.hidden_moment is not None:
        moments = statistics.hidden_moment
        moment = moments[expert] if bool(moments[expert].diagonal().any()) else moments.mean(0)
        return _factor(moment).mT.contiguous()
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
    floor = _DAMPING * common.mean()
    if floor <= 0 or count + shrinkage <= 0:
        return torch.ones_like(common).float()
    shrunk = (count * (own + floor) + shrinkage * (common + floor)) / (count + shrinkage)
    return (shrunk / (common + floor)).sqrt().float()
