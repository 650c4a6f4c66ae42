"""Every expert whole, in fewer bits: by rounding, by GPTQ, or by a library."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .grid import Bits, round_nearest, round_with_feedback
from .libraries import LIBRARIES
from .task import Approximation, Layer, Task, Tensor

Rounding = Callable[[Tensor, Tensor | None, Bits], tuple[Tensor, int]]


def nearest(matrix: Tensor, moment: Tensor | None, bits: Bits) -> tuple[Tensor, int]:
    """To the nearest, scales of least squared error, weighted by the moment's diagonal where there is one."""
    weights = moment.diagonal() if moment is not None else None
    return round_nearest(matrix, bits, weights), bits.bytes(*matrix.shape)


def gptq(matrix: Tensor, moment: Tensor | None, bits: Bits) -> tuple[Tensor, int]:
    """With error feedback in the moment of what the matrix multiplies."""
    if moment is None:
        raise ValueError(f"gptq:{bits} needs activation statistics; ask for @inputs")
    return round_with_feedback(matrix, moment, bits), bits.bytes(*matrix.shape)


ROUNDINGS: dict[str, Rounding] = {"rtn": nearest, "gptq": gptq, **LIBRARIES}


def fit(task: Task, rounding: Rounding) -> Approximation:
    """Each expert rounded along what it multiplies; the bytes follow from the bits, whatever the budget is."""
    if task.bits is None:
        raise ValueError("weights are rounded to bits; name them as in rtn:4g32")
    first = _along_inputs(task.layers[0])[0][0]
    each = rounding(first, torch.eye(first.shape[1], dtype=torch.float64), task.bits)[1]
    return Approximation(len(task.layers) * task.experts * each, _layers(task, rounding), {"bits": str(task.bits)})


def _layers(task: Task, rounding: Rounding) -> Iterator[Tensor]:
    assert task.bits is not None
    for layer in task.layers:
        weights, moments = _along_inputs(layer)
        if moments is None or len(moments) == 1:  # one moment: the rows of all experts are of one matrix
            found = rounding(weights.flatten(0, 1), None if moments is None else moments[0], task.bits)[0]
            found = found.view_as(weights)
        else:
            found = torch.stack([rounding(*each, task.bits)[0] for each in zip(weights, moments, strict=True)])
        yield found.mT if layer.transposed else found


def _along_inputs(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Weights (E, outputs, inputs) and the moments of the inputs: one, one for every expert, or none."""
    if layer.transposed:
        return layer.weights.mT.contiguous(), layer.rows
    return layer.weights, None if layer.columns is None else layer.columns[None]
