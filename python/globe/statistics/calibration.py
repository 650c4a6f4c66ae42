"""Activation statistics of a checkpoint's experts: what `globe calibrate` finds, and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.tensorfile import DTYPE_NAMES, TensorWriter, read_header, read_tensor
from globe.errors import GlobeError

FORMAT = "globe-calibration-2"
TOKENS = ("windows", "samples", "held_out_samples")  # ids; samples are what the model itself wrote
MOMENTS = ("gate_moment", "up_moment", "hidden_moment")  # p × p for every expert; a file may lack them


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of one decoder layer's mixture of experts, over the tokens of a calibration text.

    Means weigh a token by 1/‖h‖², h its residual stream behind the block: an error of the block's output counts
    relative to it, and a few tokens of huge norm do not count for all others. An expert's means are over the tokens
    that the router sends it, each by the square of its routing weight too; where it sends none they are zero. All are
    fp32, accumulated in fp64.

    Parameters
    ----------
    moment : torch.Tensor, shape (d, d)
        E[x xᵀ] of the block's input x, over all tokens.
    residual : torch.Tensor, shape ()
        Harmonic mean of ‖h‖² over all tokens.
    share : torch.Tensor, shape (E,)
        E[w²] of the routing weights w, over all tokens.
    counts : torch.Tensor of int64, shape (E,)
        Tokens routed to each expert.
    diagonal : torch.Tensor, shape (E, d)
        Diagonal of E[x xᵀ] of each expert's own tokens; that of `moment` where the means of two halves of them (every
        other 128 tokens of the text) differ more from each other than from it, in root mean square relative to it.
    gate_rows, up_rows : torch.Tensor, shape (E, p)
        Squared effect of a unit error in a row's product on the expert's output: E[(φ'(g_k) u_k)²] ‖down_k‖² and
        E[φ(g_k)²] ‖down_k‖², φ the activation, g and u the gate's and the up matrix's products.
    hidden : torch.Tensor, shape (E, p)
        E[h_k²] of down's input h = φ(g) u.
    hidden_moment : torch.Tensor, shape (E, p, p), optional
        E[h hᵀ].
    gate_moment, up_moment : torch.Tensor, shape (E, p, p), optional
        The matrices whose diagonals are `gate_rows` and `up_rows`: E[s sᵀ] ∘ downᵀdown, s the factor of the row.
    own_directions : torch.Tensor, shape (E, d, k), optional
        U_e of E[x xᵀ] of each expert's own tokens as c_e L (I + U_e Λ_e U_eᵀ) Lᵀ, L the Cholesky factor of `moment`
        with 10⁻³ of its mean diagonal added; columns are orthonormal.
    own_values : torch.Tensor, shape (E, k), optional
        Λ_e, shrunk towards zero; all zero where an expert's tokens say nothing that the layer's do not.
    own_sizes : torch.Tensor, shape (E,), optional
        c_e; 1 there.
    gate_fisher, up_fisher : torch.Tensor, shape (E, p), optional
        Fisher information of the products gate x and up x: see `globe.statistics.fisher.Fisher`. It is of fewer tokens
        than the other means, none of which is weighed.
    output_fisher : torch.Tensor, shape (d, d), optional
        That of the block's output.
    fisher_counts : torch.Tensor of int64, shape (E,), optional
        Tokens routed to each expert, of those.
    """

    moment: torch.Tensor
    residual: torch.Tensor
    share: torch.Tensor
    counts: torch.Tensor
    diagonal: torch.Tensor
    gate_rows: torch.Tensor
    up_rows: torch.Tensor
    hidden: torch.Tensor
    hidden_moment: torch.Tensor | None = None
    gate_moment: torch.Tensor | None = None
    up_moment: torch.Tensor | None = None
    own_directions: torch.Tensor | None = None
    own_values: torch.Tensor | None = None
    own_sizes: torch.Tensor | None = None
    gate_fisher: torch.Tensor | None = None
    up_fisher: torch.Tensor | None = None
    output_fisher: torch.Tensor | None = None
    fisher_counts: torch.Tensor | None = None


@dataclass(frozen=True)
class Calibration:
    """A calibration file: which layers have experts, their statistics (read when asked for), and where they are from.

    `about` holds `fingerprint` of the checkpoint, `text`, `tokens`, `window`, `globe_version`, and as `products` the
    dtype that layers ran in. `texts` has for every text its `name`, `weight`, `share` and number of `tokens`, and the
    `sha256` of what was read of it; for the model's own samples also how they were made, and theirs of the tokens as
    64-bit numbers.
    """

    path: Path
    layers: tuple[int, ...]
    about: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether all layers have a statistic, a field of `LayerStatistics`."""
        stored = read_header(self.path).tensors
        return all(f"layers.{number}.{name}" in stored for number in self.layers)

    def tokens(self, name: str) -> torch.Tensor | None:
        """Token ids by a name of `TOKENS`, in 64 bits; None where the file has none.

        `windows` (n, window) of texts and `samples` (n, length) of the model itself were calibrated on,
        `held_out_samples` were not.
        """
        info = read_header(self.path).tensors.get(name)
        return read_tensor(info).to(torch.int64) if info is not None else None

    @property
    def parts(self) -> list[torch.Tensor]:
        """The token ids that were calibrated on, as windows of one length each; none in a file of before."""
        found = [self.tokens(name) for name in TOKENS[:2]]
        return [ids for ids in found if ids is not None]

    def layer(self, number: int) -> LayerStatistics:
        """The statistics of decoder layer `number`.

        Raises
        ------
        GlobeError
            If the file has none for it, or they are damaged.
        """
        prefix = f"layers.{number}."
        stored = read_header(self.path).tensors
        mine = {name.removeprefix(prefix): info for name, info in stored.items() if name.startswith(prefix)}
        if not mine:
            raise GlobeError(f"calibration {self.path}: no statistics of layer {number}; calibrate this model")
        found = {name: read_tensor(info) for name, info in mine.items()}
        for name, value in found.items():
            if not torch.isfinite(value).all():
                raise GlobeError(f"calibration {self.path}: {prefix}{name} is not finite; calibrate this model again")
        return LayerStatistics(**found)


def save_calibration(
    path: Path,
    layers: Mapping[int, LayerStatistics],
    about: Mapping[str, Any],
    tokens: Mapping[str, torch.Tensor] | None = None,
) -> Calibration:
    """Write statistics to one safetensors file, under a temporary name first; `tokens` by names of `TOKENS`."""
    tensors = {
        f"layers.{number}.{field.name}": value.contiguous()
        for number, statistics in layers.items()
        for field in fields(statistics)
        if (value := getattr(statistics, field.name)) is not None
    }
    tensors |= {name: ids.to(torch.int32).contiguous() for name, ids in (tokens or {}).items()}
    metadata = {"format": FORMAT, "layers": json.dumps(sorted(layers)), "about": json.dumps(dict(about))}
    entries = {name: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    with TensorWriter(path, entries, metadata) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    return load_calibration(path)


def load_calibration(path: Path) -> Calibration:
    """Open a calibration file.

    Raises
    ------
    GlobeError
        If it is not one.
    """
    try:
        metadata = read_header(path).metadata
    except GlobeError as error:
        raise GlobeError(f"calibration {path}: cannot be read ({error}); expected a file of globe calibrate") from None
    if metadata.get("format") != FORMAT:
        raise GlobeError(f"calibration {path}: format is {metadata.get('format')!r}; expected {FORMAT}")
    return Calibration(path, tuple(json.loads(metadata["layers"])), json.loads(metadata["about"]))
