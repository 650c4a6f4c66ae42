"""The index of a checkpoint directory: its tensors, its layout, and the experts of each family."""

from __future__ import annotations

import gc
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from globe.checkpoint.companions import companions
from globe.checkpoint.completeness import Source, require_complete, stated_experts
from globe.checkpoint.family import Expert, Family
from globe.checkpoint.foreign import missing_directory, missing_weights, unknown_layout
from globe.checkpoint.formats.encoded import Encoded
from globe.checkpoint.formats.tensors import has_outputs_first, open_all, open_encoded, plain_name
from globe.checkpoint.json_file import read_json
from globe.checkpoint.layouts import Layout, read_layouts
from globe.checkpoint.quantised import TEXT_CONFIGS, is_quantised
from globe.checkpoint.shards import INDEX_NAME, SINGLE, read_shards
from globe.checkpoint.tensorfile import TensorInfo
from globe.errors import GlobeError, UsageError


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
            raise missing_directory(self.directory)
        factored = (self.directory / "globe.json").exists()
        if not factored and not any((self.directory / name).exists() for name in (INDEX_NAME, SINGLE)):
            told = missing_weights(self.directory)
            if told is not None:
                raise told
        self.config = read_json(self.directory / "config.json")
        if factored:
            raise GlobeError(f"{directory}: this is a factored checkpoint already; pass the dense source instead")
        self._encoded: dict[str, Encoded] = {}
        self._families: dict[str, Family] = {}
        with uncollected():
            self.index, self.shards, self._noted = read_shards(self.directory)
        self.tensors = {name: info for shard in self.shards for name, info in shard.tensors.items()}

    @cached_property
    def layout(self) -> Layout:
        """The layout of config.json's model type, confirmed by the names of the tensors."""
        model_type = self.config.get("model_type")
        for layout in read_layouts():
            if layout.is_of(model_type) and any(layout.held(plain_name(name)) is not None for name in self.tensors):
                return layout
        raise unknown_layout(self.directory, self.config, self.tensors)

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """config.json, with what it says of the language model of several models in the place of its own."""
        found = self.config
        for name in TEXT_CONFIGS:
            inner = found.get(name)
            found = {**found, **inner} if isinstance(inner, dict) else found
        return found

    @property
    def layers(self) -> int | None:
        """The number of layers that config.json states; later ones predict further tokens."""
        layers = self.text_config.get("num_hidden_layers")
        if layers is not None and not isinstance(layers, int):
            raise GlobeError(
                f"{self.directory}: config.json: num_hidden_layers is {layers!r}; expected an integer: fetch it again"
            )
        return layers

    @property
    def notes(self) -> list[str]:
        """What is worth a word before the work: files and tensors that are left behind, layers that are not used."""
        beside = companions(self.directory, frozenset(shard.path.name for shard in self.shards)).left
        told = [f"left behind: {', '.join(beside)}"] if beside else []
        return [*self._noted, *self._experts[1], *told]

    @cached_property
    def _experts(self) -> tuple[dict[str, list[Expert]], list[str]]:
        """All families' experts in order of layer and number, complete; and what is noteworthy."""
        with uncollected():
            return self._found()

    def _found(self) -> tuple[dict[str, list[Expert]], list[str]]:
        families = self.layout.families
        found: dict[str, list[Expert]] = {family: [] for family in families}
        held: dict[str, dict[tuple[int, int], str]] = {family: {} for family in families}
        layers, group = self.layers, self._group
        for tensor, info in self.tensors.items():
            name = plain_name(tensor)
            place = self.layout.held(name)
            if place is None or (layers is not None and place[0] >= layers):
                continue  # a layer past num_hidden_layers predicts further tokens and is left alone
            if group is not None and place[1] is not None and place[1] >= group:
                continue  # of another group, for images, of another width
            matrix = self._matrix(tensor, info)
            for family in place[2]:
                for expert in _experts_of(name, matrix, family, place[:2], self.layout):
                    known = held[family].setdefault((expert.layer, expert.expert), tensor)
                    if known != tensor:
                        raise GlobeError(
                            f"{self.directory}: expert {expert.expert} of layer {expert.layer} is in {known} and in "
                            f"{tensor}; expected one of them: remove the other, or fetch the checkpoint again"
                        )
                    found[family].append(expert)
        for experts in found.values():
            experts.sort(key=lambda expert: (expert.layer, expert.expert))
        source = Source(self.directory, self.text_config, self.layout, layers, self.tensors)
        noted = require_complete(source, held)
        return {family: _in_turn(experts) for family, experts in found.items()}, noted

    @property
    def _group(self) -> int | None:
        """The experts of the first group, where the numbers of a layer go on with another's."""
        return stated_experts(self.text_config, self.layout) if self.layout.groups else None

    def _matrix(self, tensor: str, info: TensorInfo) -> TensorInfo | Encoded:
        """A tensor of experts, or what it is decoded to."""
        if not is_quantised(info.dtype):
            return info
        if tensor not in self._encoded:
            matrix = open_encoded(tensor, self.tensors, self.config)
            turned = self.layout.transposed and has_outputs_first(tensor)
            self._encoded[tensor] = replace(matrix, turned=True) if turned else matrix
        return self._encoded[tensor]

    @cached_property
    def decoded(self) -> dict[str, TensorInfo | Encoded]:
        """All tensors as a model has them: what is stored as codes, beside the experts too, as what it decodes to.

        Raises
        ------
        GlobeError
            If codes are of no format that is read.
        """
        found = open_all(self.tensors, self.config)
        for matrix in self.encoded:
            found[matrix.name] = matrix
        return found

    @property
    def encoded(self) -> tuple[Encoded, ...]:
        """What is stored as codes of the routed experts, each read as the matrix that it decodes to."""
        assert self._experts is not None
        return tuple(self._encoded.values())

    def family(self, name: str) -> Family:
        """Collect one family's experts and check their shapes against each other and config.json."""
        if name not in self._families:
            self._families[name] = self._collected(name)
        return self._families[name]

    def _collected(self, name: str) -> Family:
        experts = self._experts[0].get(name, [])
        for expert in experts:
            if expert.info.dtype not in ("BF16", "F16", "F32"):
                raise GlobeError(
                    f"tensor {expert.tensor} has dtype {expert.info.dtype}; expected BF16, F16 or F32: dequantise first"
                )
        if not experts:
            raise GlobeError(f"{self.directory}: no routed experts of family {name} found; fetch the checkpoint again")
        return self._checked(name, experts)

    @cached_property
    def leading(self) -> Family:
        """The family gate, or up where experts have no gate."""
        return self.family(self.layout.families[0])

    def chosen(self, names: Iterable[str]) -> dict[str, Family]:
        """The families of these names that the experts have: those without a gate have none to choose.

        Raises
        ------
        UsageError
            If they have none of them.
        """
        found = {name: self.family(name) for name in names if name in self.layout.families}
        if not found:
            raise UsageError(
                f"families is {', '.join(names)}; the experts of {self.layout.name} have "
                f"{' and '.join(self.layout.families)}: choose of these"
            )
        return found

    def _checked(self, name: str, experts: list[Expert]) -> Family:
        layout = self.layout
        shapes = [expert.matrix for expert in experts]
        expected = Counter(shapes).most_common(1)[0][0]
        odd = next((expert for expert, shape in zip(experts, shapes, strict=True) if shape != expected), None)
        if odd is not None:
            usual = next(expert for expert in experts if expert.matrix == expected)
            raise GlobeError(
                f"tensor {odd.tensor} has shape {list(odd.info.shape)}, the other experts of family {name} have "
                f"{list(usual.info.shape)}; one bank needs equal shapes: fetch the checkpoint again"
            )
        if 0 in expected:
            shape = list(experts[0].info.shape)
            raise GlobeError(
                f"tensor {experts[0].tensor} has shape {shape}; expected a matrix with weights: fetch it again"
            )
        p, d = expected
        per_layer = Counter(expert.layer for expert in experts)
        counts = {
            "experts per layer": (layout.experts_keys, set(per_layer.values())),
            "expert width": (layout.width_keys, {p}),
            "model width": (("moe_latent_size", "moe_hidden_size", "hidden_size"), {d}),
        }
        for what, (keys, values) in counts.items():
            config = self.text_config
            stated = next((config[key] for key in keys if isinstance(config.get(key), int)), None)
            if stated is not None and values != {stated}:
                raise GlobeError(
                    f"{self.directory}: config.json states {stated} as {what}, the tensors of family {name} have "
                    f"{', '.join(map(str, sorted(values)))}; fetch both again, or mend config.json"
                )
        return Family(name, tuple(experts), p, d)

    @cached_property
    def elements(self) -> float:
        """The weights of the whole checkpoint; of what is stored as codes, scales and all, two bytes count as one."""
        parts = {part.tensor for matrix in self.encoded for part in matrix.parts.values()}
        counted = sum(matrix.nbytes / 2 for matrix in self.encoded)
        for name, info in self.tensors.items():
            if name not in parts:
                counted += info.nbytes / 2 if is_quantised(info.dtype) else math.prod(info.shape)
        return counted

    @cached_property
    def expert_elements(self) -> float:
        """The weights of all routed experts, gate, up and down, counted as in `elements`."""
        return sum(expert.counted for expert in self._all_experts())

    def expert_bytes(self) -> int:
        """The bytes of all routed experts, as they are stored."""
        return sum(expert.stored_bytes for expert in self._all_experts())

    def _all_experts(self) -> Iterator[Expert]:
        for experts in self._experts[0].values():
            yield from experts

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


@contextmanager
def uncollected() -> Iterator[None]:
    """Make many small objects that all stay, without the collector looking through them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _in_turn(experts: list[Expert]) -> list[Expert]:
    """Experts, sorted, of every layer numbered from 0 on: numbers may have gaps in the names of tensors."""
    found: list[Expert] = []
    layer, number = -1, 0
    for expert in experts:
        layer, number = expert.layer, number + 1 if expert.layer == layer else 0
        found.append(expert if expert.expert == number else replace(expert, expert=number))
    return found


def _experts_of(
    tensor: str, info: TensorInfo | Encoded, family: str, place: tuple[int, int | None], layout: Layout
) -> Iterator[Expert]:
    """The experts of a family that a tensor holds: one, or where it has no number all of a layer."""
    layer, number = place
    both = number is None and family != "down" and layout.fused.get("gate") == layout.fused["up"]
    swapped = number is None and layout.transposed and not (isinstance(info, Encoded) and info.turned)
    axes = 2 if number is not None else 3
    outputs = info.shape[-1 if swapped else -2] if len(info.shape) == axes else 0
    if len(info.shape) != axes or (both and outputs % 2):
        even = ", outputs of gate and up" if both and len(info.shape) == axes else ""
        raise GlobeError(
            f"tensor {tensor} has shape {list(info.shape)}; expected {axes} axes{even}: fetch the checkpoint again"
        )
    if number is not None:
        yield Expert(layer, number, tensor, info, None, 0, family)
        return
    step = 2 if both and layout.interleaved else 1
    second = 1 if step == 2 else outputs // 2
    first = second if both and family == "up" else 0
    for index in range(info.shape[0]):
        yield Expert(layer, index, tensor, info, index, first, family, 0, both, step, swapped)
