"""The index of a checkpoint directory: its tensors, its layout, and the experts of each family."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.errors import GlobeError
from globe.tensorfile import TORCH_DTYPES, FileHeader, TensorInfo, read_header, read_tensor

FAMILIES = ("gate", "up", "down")
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """One entry of layouts.json: how a family of architectures names its routed experts."""

    name: str
    model_types: tuple[str, ...]
    experts_keys: tuple[str, ...]
    width_keys: tuple[str, ...]
    templates: dict[str, str]
    fused: str | None
    fused_down: str | None

    def matcher(self, family: str) -> re.Pattern[str]:
        """A pattern for a family's tensor names (gate, up, down), with groups `layer` and (unless fused) `expert`."""
        fused = self.fused_down if family == "down" else self.fused
        template = re.escape(fused or self.templates[family])
        for field in ("layer", "expert"):
            template = template.replace(re.escape("{" + field + "}"), rf"(?P<{field}>\d+)")
        return re.compile(template)


@dataclass(frozen=True)
class Expert:
    """One expert matrix W_i: its place in the model, its tensor, and the part of it (fused layouts)."""

    layer: int
    expert: int
    tensor: str
    info: TensorInfo
    index: int | None
    first_row: int
    family: str = "gate"

    @property
    def transposed(self) -> bool:
        """Whether W_i is the transpose of what is stored: down, whose left factor then has the expert's width."""
        return self.family == "down"

    def read(self, rows: tuple[int, int], out: torch.Tensor | None = None) -> torch.Tensor:
        """Read rows of W_i from the first to before the last, contiguous and in the checkpoint's dtype.

        Of a transposed expert all is read, whatever the rows: they lie scattered.
        """
        if not self.transposed:
            first, last = rows
            return read_tensor(self.info, (self.first_row + first, self.first_row + last), self.index, out)
        stored = read_tensor(self.info, None, self.index)
        if out is None:
            out = torch.empty(rows[1] - rows[0], len(stored), dtype=stored.dtype)
        if len(out) == stored.shape[1]:
            return out.copy_(stored.T)
        np.copyto(_bits(out), _bits(stored).T[slice(*rows)])  # on this thread; torch would wake its pool
        return out


@dataclass(frozen=True)
class Family:
    """N expert matrices of one shape p × d in order of layer and expert: all gates, ups or downs, or a pool of them.

    p is the width of the experts and d that of the model: down is taken transposed.
    """

    name: str
    experts: tuple[Expert, ...]
    p: int
    d: int

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def families(self) -> tuple[str, ...]:
        """The families that its experts come from."""
        return tuple(dict.fromkeys(expert.family for expert in self.experts))

    @property
    def layers(self) -> int:
        """The number of layers that hold routed experts."""
        return len({expert.layer for expert in self.experts})

    @property
    def bytes_per_weight(self) -> int:
        """2 for bf16 and fp16, 4 for fp32."""
        return 4 if self.experts[0].info.dtype == "F32" else 2

    def read(self, number: int, rows: tuple[int, int] | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read W_i (or its rows from the first to before the last), in the checkpoint's dtype, into `out` if given."""
        return self.experts[number].read(rows if rows is not None else (0, self.p), out)

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's dtype of the experts."""
        return TORCH_DTYPES[self.experts[0].info.dtype]

    def read_some(self, span: slice, out: torch.Tensor) -> torch.Tensor:
        """Read W_i for i in a slice into the first entries of `out` (n, p, d), in the checkpoint's dtype."""
        for place in range(span.stop - span.start):
            self.read(span.start + place, out=out[place])
        return out[: span.stop - span.start]

    def batches(self, size: int) -> Iterator[range]:
        """The experts' numbers in runs of at most `size`."""
        for first in range(0, len(self), size):
            yield range(first, min(first + size, len(self)))


class Checkpoint:
    """A safetensors checkpoint directory, indexed from its headers alone.

    Parameters
    ----------
    directory : Path
        A directory with config.json and either model.safetensors or shards with their index.

    Raises
    ------
    GlobeError
        If a file is missing, truncated or inconsistent with the index.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise GlobeError(f"{directory}: no such directory; expected a checkpoint directory with config.json")
        self.config = read_json(self.directory / "config.json")
        if (self.directory / "globe.json").exists():
            raise GlobeError(f"{directory}: this is a factored checkpoint already; pass the dense source instead")
        self.index, names = self._shard_names()
        self.shards: list[FileHeader] = [read_header(self.directory / name) for name in names]
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, info in shard.tensors.items():
                if name in self.tensors:
                    raise GlobeError(f"tensor {name} is in both {self.tensors[name].file.name} and {shard.path.name}")
                self.tensors[name] = info
        self._check_index()

    def _shard_names(self) -> tuple[dict[str, Any] | None, list[str]]:
        index_path = self.directory / INDEX_NAME
        if index_path.exists():
            index = read_json(index_path)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise GlobeError(f"{index_path}: weight_map is missing or empty; fetch the index again")
            for tensor, name in weight_map.items():
                if not isinstance(name, str):
                    raise GlobeError(f"{index_path}: tensor {tensor} is mapped to {name!r}; expected a file name")
            names = sorted(set(weight_map.values()))
            for name in names:
                if Path(name).name != name or "\0" in name:
                    raise GlobeError(f"{index_path}: shard {name!r} lies outside the directory; expected a file name")
                if not (self.directory / name).exists():
                    raise GlobeError(f"{self.directory}: shard {name} named by {INDEX_NAME} is missing; fetch it")
            return index, names
        if (self.directory / "model.safetensors").exists():
            return None, ["model.safetensors"]
        raise GlobeError(f"{self.directory}: neither model.safetensors nor {INDEX_NAME} found")

    def _check_index(self) -> None:
        if self.index is None:
            return
        for name, file in self.index["weight_map"].items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise GlobeError(f"{INDEX_NAME} names tensor {name} in {file}, which does not hold it")

    @cached_property
    def layout(self) -> Layout:
        """The layout whose names the tensors bear, confirmed by config.json."""
        model_type = self.config.get("model_type")
        found = [layout for layout in read_layouts() if any(map(layout.matcher(FAMILIES[0]).fullmatch, self.tensors))]
        for layout in found:
            if model_type in layout.model_types:
                return layout
        known = sorted({name for layout in read_layouts() for name in layout.model_types})
        what = "has tensors of routed experts, but" if found else "has no tensors of routed experts that are known, and"
        raise GlobeError(
            f"{self.directory}: unknown architecture: the checkpoint {what} config.json says model_type "
            f"{model_type!r}; supported are {', '.join(known)}"
        )

    @property
    def layers(self) -> int | None:
        """The number of layers that config.json states; later ones predict further tokens."""
        layers = self.config.get("num_hidden_layers")
        if layers is not None and not isinstance(layers, int):
            raise GlobeError(f"{self.directory}: config.json: num_hidden_layers is {layers!r}; expected an integer")
        return layers

    def family(self, name: str) -> Family:
        """Collect one family's experts and check their shapes against each other and config.json."""
        layout, matcher = self.layout, self.layout.matcher(name)
        layers = self.layers
        experts: list[Expert] = []
        for tensor, info in self.tensors.items():
            match = matcher.fullmatch(tensor)
            if match is None or (layers is not None and int(match["layer"]) >= layers):
                continue  # a layer past num_hidden_layers predicts further tokens and is left alone
            if info.dtype not in ("BF16", "F16", "F32"):
                raise GlobeError(f"tensor {tensor} has dtype {info.dtype}; expected BF16, F16 or F32: dequantise first")
            rank, halves = (3, 1 if name == "down" else 2) if layout.fused else (2, 1)
            if len(info.shape) != rank or info.shape[-2] % halves:
                raise GlobeError(f"tensor {tensor} has shape {list(info.shape)}; expected {rank} axes")
            layer = int(match["layer"])
            if layout.fused:
                first = info.shape[1] // 2 if name == "up" else 0
                experts += [Expert(layer, e, tensor, info, e, first, name) for e in range(info.shape[0])]
            else:
                experts.append(Expert(layer, int(match["expert"]), tensor, info, None, 0, name))
        if not experts:
            raise GlobeError(f"{self.directory}: no routed experts of family {name} found")
        experts.sort(key=lambda expert: (expert.layer, expert.expert))
        return self._checked(name, experts)

    def _checked(self, name: str, experts: list[Expert]) -> Family:
        layout = self.layout
        shapes = Counter(expert.info.shape for expert in experts)
        expected = shapes.most_common(1)[0][0]
        odd = next((expert for expert in experts if expert.info.shape != expected), None)
        if odd is not None:
            raise GlobeError(
                f"tensor {odd.tensor} has shape {list(odd.info.shape)}, the other experts of family {name} have "
                f"{list(expected)}; one bank needs equal shapes"
            )
        if 0 in expected:
            raise GlobeError(f"tensor {experts[0].tensor} has shape {list(expected)}; expected a matrix with weights")
        if name == "down":
            d, p = expected[-2:]
        else:
            p, d = (expected[1] // 2, expected[2]) if layout.fused else expected
        per_layer = Counter(expert.layer for expert in experts)
        counts = {
            "experts per layer": (layout.experts_keys, set(per_layer.values())),
            "expert width": (layout.width_keys, {p}),
            "model width": (("hidden_size",), {d}),
        }
        for what, (keys, values) in counts.items():
            stated = next((self.config[key] for key in keys if isinstance(self.config.get(key), int)), None)
            if stated is not None and values != {stated}:
                raise GlobeError(
                    f"{self.directory}: config.json states {stated} as {what}, the tensors of family {name} have "
                    f"{', '.join(map(str, sorted(values)))}; the checkpoint is incomplete or not of this architecture"
                )
        return Family(name, tuple(experts), p, d)

    def elements(self) -> int:
        """The number of weights in the whole checkpoint."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def expert_elements(self) -> int:
        """The number of weights in all routed experts: gate, up and down."""
        matchers = {self.layout.matcher(family) for family in FAMILIES}
        layers = self.layers
        total = 0
        for name, info in self.tensors.items():
            for matcher in matchers:
                match = matcher.fullmatch(name)
                if match is not None and (layers is None or int(match["layer"]) < layers):
                    total += math.prod(info.shape)
        return total

    def fingerprint(self) -> str:
        """SHA-256 over config.json, every header, and 16 samples of 64 KiB of every shard's data."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for shard in self.shards:
            digest.update(shard.path.name.encode() + shard.raw)
            size = shard.path.stat().st_size
            with shard.path.open("rb") as file:
                for sample in range(16):
                    file.seek(size * sample // 16)
                    digest.update(file.read(65536))
        return digest.hexdigest()


def _bits(tensor: torch.Tensor) -> NDArray[Any]:
    """The same memory as integers: NumPy has no bf16."""
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()


def read_layouts() -> list[Layout]:
    """The registry of tensor-name templates, layouts.json."""
    text = importlib.resources.files("globe").joinpath("layouts.json").read_text(encoding="utf-8")
    return [
        Layout(
            entry["name"],
            tuple(entry["model_types"]),
            tuple(entry["experts_keys"]),
            tuple(entry["width_keys"]),
            entry.get("templates", {}),
            entry.get("fused"),
            entry.get("fused_down"),
        )
        for entry in json.loads(text)
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object.

    Raises
    ------
    GlobeError
        If it does not.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GlobeError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise GlobeError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise GlobeError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
