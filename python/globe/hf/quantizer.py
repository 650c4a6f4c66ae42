"""The plug-in: `from_pretrained` builds factored experts and finds their tensors in the files."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from types import MethodType
from typing import Any

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from globe.artifact.autoload import METHOD
from globe.artifact.factored import FORMAT_VERSION, INDEX_FILE, bank_name, left_name, rest_name
from globe.checkpoint.formats.packed import PACKED, SCALE, SHAPE, Packing, read_packing
from globe.checkpoint.quantised import quantization_of, require_plain
from globe.checkpoint.tensorfile import TensorInfo, read_header
from globe.errors import GlobeError, UsageError
from globe.hf.banks import Banks, bank_parts
from globe.hf.experts import FactoredExperts, Place
from globe.hf.offload import Files, map_matrices, stored_lefts, stored_matrices
from globe.hf.save import save_offloaded, save_pretrained

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?!.*\bvision_moe\b)(?:.*\.)?experts$")
_BESIDE = re.compile(r"(?:^|\.)talker\.")  # a model that speaks: its layers have the same numbers
_OURS = re.compile(rf"(?:^|[._])(?:gate|up|down)_left(?:{PACKED}|{SCALE}|{SHAPE})?$")  # in files of any maker
_GATE_UP, _UP, _DOWN = "experts.gate_up_proj", "experts.up_proj", "experts.down_proj"


@register_quantization_config(METHOD)
class GlobeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of config.json: `weights` is the weight file, or the index of several.

    `experts` has, per family and layer, the arguments of `Place`, with the bank by its name. `packed` has bits and
    group of packed left factors (`lefts`) by family, and of packed atoms (`atoms`) by bank. `offload` is no part of
    config.json: "disk" where `globe.load` is to leave experts in their files.
    """

    def __init__(
        self,
        experts: dict[str, dict[str, list[Any]]] | None = None,
        weights: str = INDEX_FILE,
        format_version: int = FORMAT_VERSION,
        replaced: dict[str, Any] | None = None,
        packed: dict[str, dict[str, Any]] | None = None,
        offload: str | None = None,
        **unknown: Any,
    ) -> None:
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise GlobeError(
                f"config.json: format version {format_version!r}, this GloBE reads 1 to {FORMAT_VERSION}; "
                "update globe-moe"
            )
        if not experts:
            raise GlobeError("config.json: quantization_config names no experts; compress the source again")
        self.quant_method = METHOD
        self.format_version = format_version
        self.weights = weights
        self.experts = experts
        if replaced:
            self.replaced = replaced
        if packed:
            self.packed = packed
        if offload is not None:
            self.offload = offload

    def packings(self, part: str) -> dict[str, Packing]:
        """How left factors (`lefts`, by family) or atoms (`atoms`, by bank) are packed.

        Raises
        ------
        GlobeError
            If config.json is damaged.
        """
        told = getattr(self, "packed", {}).get(part, {})
        try:
            found = {name: read_packing(each, each["group"]) for name, each in told.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise GlobeError(
                f"config.json: quantization_config: packed {part} are {told!r}; expected bits and group by name: "
                "compress again"
            ) from None
        return {name: packing for name, packing in found.items() if packing is not None}


@register_quantizer(METHOD)
class GlobeQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces experts modules by `FactoredExperts`, and hangs the banks on the model as `model.globe`."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight files: of all hooks, this one sees config.json before they are looked for."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        stored = _stored_tensors(kwargs.get("checkpoint_files"))
        lefts, atoms = (self.quantization_config.packings(part) for part in ("lefts", "atoms"))
        kept = [info.dtype for name, info in stored.items() if not name.startswith("globe.") and not _OURS.search(name)]
        replaced = getattr(self.quantization_config, "replaced", {})
        require_plain(
            Path(kwargs["checkpoint_files"][0]).parent,
            kept,
            quantization_of(replaced),
            "dequantise the source first, or load what globe export writes",
        )
        shapes = {name: info.shape for name, info in stored.items()}
        experts: dict[str, dict[str, list[Any]]] = self.quantization_config.experts
        names = dict.fromkeys(place[0] for layers in experts.values() for place in layers.values())
        for name in names:
            for part in bank_parts(atoms.get(name)):
                if bank_name(name, part) not in shapes:
                    raise GlobeError(f"tensor {bank_name(name, part)} is in none of the weight files; compress again")
        model.globe = Banks(names, shapes, atoms)
        files = Files() if self._offloads else None
        if files is not None and lefts:
            raise UsageError(
                f"left factors are packed (family {', '.join(lefts)}), and offload takes those that are not; "
                "load them without, they take a fraction of the memory"
            )
        wanted = {layer for layers in experts.values() for layer in layers}
        matches = {
            name: match
            for name, module in model.named_modules()
            if (match := _LAYER.search(name)) and match[1] in wanted and "down_proj" in module._parameters
        }
        beside = next((name for name in matches if _BESIDE.search(name)), None)
        if beside is not None:
            raise GlobeError(
                f"{type(model).__name__} has experts of its own in {beside}, which lie dense beside the factored ones "
                "of its language model: run what globe export writes"
            )
        for name, match in matches.items():
            places = {
                family: Place(model.globe.banks[layers[match[1]][0]], *layers[match[1]][1:])
                for family, layers in experts.items()
                if match[1] in layers
            }
            found = {f"{family}_left": stored_lefts(stored, int(match[1]), f"{family}_left") for family in places}
            mapped = {held: map_matrices(files, each) for held, each in found.items() if files is not None and each}
            factored = FactoredExperts(model.get_submodule(name), places, model.globe, lefts, mapped)
            _require_stored(stored, int(match[1]), factored)
            model.set_submodule(name, factored)
            block = model.get_submodule(name.rpartition(".")[0])
            if not block._parameters:  # some (qwen3_omni_moe) would begin matrices of the experts anew
                block._is_hf_initialized = True
        if files is not None:
            self._mapping = files, stored
            ignored = model._keys_to_ignore_on_load_unexpected
            model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), _OURS.pattern, r"experts\.down_proj$"}
        if not matches:  # one layer's alone may be missing: transformers drops those that config.json says are dense
            raise GlobeError(
                f"{type(model).__name__} of transformers has no module of its own for the experts of layer "
                f"{min(wanted, key=int)}, with gate_up_proj or up_proj, and down_proj: run what globe export writes"
            )
        self._tied = _tie(model)
        if self._tied and files is not None:
            raise UsageError(f"{type(model).__name__} ties experts to others, which offload does not; load it without")

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Merge the experts' left factors as transformers merges their matrices, and split them again on saving."""
        factored, packed = set(self.quantization_config.experts), self.quantization_config.packings("lefts")
        before: list[Any] = []
        kept: list[Any] = []
        for conversion in weight_conversions:
            targets = getattr(conversion, "_original_target_patterns", [])
            sources = getattr(conversion, "_original_source_patterns", [])
            families = _families(conversion, targets, sources)
            if len(targets) > 1 and all(target.endswith((_GATE_UP, _DOWN)) for target in targets):
                mine, others = _groups(conversion, factored, packed)
                before += mine
                kept.append(others)
                continue
            if not factored & set(families):
                if families == ("down",) and all(isinstance(step, MergeModulelist) for step in conversion.operations):
                    self._leave_down(model, sources[0])
                before += _stacked(sources, targets, factored, packed)
                kept.append(conversion)
                continue
            for family, source in zip(families, sources, strict=True):
                name = left_name(source, family) if family in factored else source
                target = re.sub(r"(gate_up|up|down)_proj$", _parameter(family, factored), targets[0])
                merged = any(isinstance(step, MergeModulelist) for step in conversion.operations)
                for part in _parts(family, packed):
                    if merged:
                        operations = [MergeModulelist(dim=0)]
                        before.append(conversion.copy([name + part], [target + part], operations=operations))
                    else:  # a stack of the family's own
                        before.append(WeightRenaming(name + part, target + part))
        stacks = [(_DOWN if name == "down" else _GATE_UP, name) for name in factored]
        stacks += [(_UP, name) for name in factored & {"up"}]
        fused = {
            left_name(stack, name) + part: f"{name}_left{part}"
            for stack, name in stacks
            for part in _parts(name, packed)
        }
        if factored & {"gate", "up"}:
            fused |= {rest_name(_GATE_UP, name): f"{name}_dense" for name in {"gate", "up"} - factored}
        renamed = [WeightRenaming(stored, f"experts.{parameter}") for stored, parameter in fused.items()]
        return [*before, *kept, *renamed]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for target, source in self._tied.items():
            model.get_submodule(target)._buffers.update(model.get_submodule(source)._buffers)
        for bank in model.globe.banks.values():
            bank.prepare()
        for name, module in model.named_modules():
            if isinstance(module, FactoredExperts):
                module.require_packed(name)
        model.globe_stats = model.globe.stats
        model.save_pretrained = MethodType(save_offloaded if self._offloads else save_pretrained, model)
        return model

    def _leave_down(self, model: Any, source: str) -> None:
        """Leave down in its files where it is dense and merged of matrices that lie there as the model has them."""
        if not self._offloads:
            return
        files, stored = self._mapping
        for name, module in model.named_modules():
            place = _LAYER.search(name)
            if place is None or not isinstance(module, FactoredExperts) or "down_proj" not in module._parameters:
                continue
            shape = tuple(module.get_parameter("down_proj").shape)
            found = stored_matrices(stored, int(place[1]), source)
            if [info.shape for info in found] == [shape[1:]] * shape[0]:
                module.leave_in_files("down_proj", map_matrices(files, found))

    @property
    def _offloads(self) -> bool:
        return hasattr(self.quantization_config, "offload")

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are not trained here."""
        return False


def _stacked(sources: list[str], targets: list[str], factored: set[str], packed: Container[str]) -> list[Any]:
    """The names of the parts of a stack of gate and up that transformers changes as it loads it."""
    if len(sources) != 1 or len(targets) != 1 or not targets[0].replace("\\", "").endswith(_GATE_UP):
        return []
    names = {name: (left_name if name in factored else rest_name)(sources[0], name) for name in ("gate", "up")}
    place = targets[0].removesuffix("gate_up_proj")
    return [
        WeightRenaming(stored + part, place + _parameter(name, factored) + part)
        for name, stored in names.items()
        for part in (_parts(name, packed) if name in factored else ("",))
    ]


def _tie(model: Any) -> dict[str, str]:
    """Tie factors of experts as transformers ties the matrices that they stand for: by target the source of a module.

    It ties parameters when all are loaded; packed factors are left to do.

    Raises
    ------
    GlobeError
        If only one of two modules that are tied is of factored experts.
    """
    tied: dict[str, str] = {}
    for target, source in list(model.all_tied_weights_keys.items()):
        owners = [name.rpartition(".")[0] for name in (target, source)]
        factored = [isinstance(model.get_submodule(owner), FactoredExperts) for owner in owners]
        if all(factored):
            del model.all_tied_weights_keys[target]
            tied[owners[0]] = owners[1]
        elif any(factored):
            raise GlobeError(
                f"{type(model).__name__} of transformers ties {target} to others: run what globe export writes"
            )
    for target, source in tied.items():
        held = model.get_submodule(source)
        names = {name: name for name in (*held._parameters, *held._buffers)}
        model.get_submodule(target)._tied_weights_keys = names  # which transformers leaves out as it saves
        model.all_tied_weights_keys |= {f"{target}.{name}": f"{source}.{name}" for name in held._parameters}
        absent = [re.escape(f"{target}.{name}") for name in held._buffers]
        model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or ()), *absent]
    return tied


def _groups(conversion: Any, factored: set[str], packed: Container[str]) -> tuple[list[Any], Any]:
    """Of a list of experts for text and for images: what merges the first, and what is left for the second.

    Raises
    ------
    GlobeError
        If gate is factored and up is not, or the reverse.
    """
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    families = ("down",) if targets[0].endswith(_DOWN) else ("gate", "up")
    if not factored & set(families):
        return [], conversion
    if not factored.issuperset(families):
        raise GlobeError(
            "transformers takes gate and up of experts out of one list with those for images, and one of the two is "
            "factored here: compress both (--families gate,up), or run what globe export writes"
        )
    place = targets[0].removesuffix("gate_up_proj").removesuffix("down_proj")
    mine = [
        conversion.copy(
            [left_name(source, family) + part], [f"{place}{family}_left{part}"], operations=[MergeModulelist(dim=0)]
        )
        for family, source in zip(families, sources, strict=True)
        for part in _parts(family, packed)
    ]
    joined = [MergeModulelist(dim=0), Concatenate(dim=1)][: len(families)]
    return mine, conversion.copy([f"{source}$" for source in sources], [targets[1]], operations=joined)


def _families(conversion: Any, targets: list[str], sources: list[str]) -> tuple[str, ...]:
    """The families that a conversion of transformers merges out of one matrix per expert."""
    if (
        isinstance(conversion, WeightConverter)
        and len(targets) == 1
        and any("expert" in name for name in [*sources, *targets])
    ):
        for end, families in ((_GATE_UP, ("gate", "up")), (_UP, ("up",)), (_DOWN, ("down",))):
            if targets[0].replace("\\", "").endswith(end) and len(sources) == len(families):
                return families
    return ()


def _parts(family: str, packed: Container[str]) -> tuple[str, ...]:
    """What the names of a family's tensors of left factors end with."""
    return (PACKED, SCALE, SHAPE) if family in packed else ("",)


def _parameter(family: str, factored: set[str]) -> str:
    """The parameter of `FactoredExperts` that holds a family."""
    if family in factored:
        return f"{family}_left"
    return "down_proj" if family == "down" else f"{family}_dense"


def _stored_tensors(files: list[str] | None) -> dict[str, TensorInfo]:
    if not files:
        raise GlobeError("a factored checkpoint is loaded from files; expected a directory written by globe compress")
    headers = [read_header(Path(file)) for file in files]
    return {name: info for header in headers for name, info in header.tensors.items()}


def _require_stored(stored: dict[str, TensorInfo], layer: int, experts: FactoredExperts) -> None:
    """Check that the files hold the left factors of a layer, which transformers would otherwise make up."""
    for family in experts.places:
        held = f"{family}_left{PACKED}" if family in experts.packings else f"{family}_left"
        if held in experts.mapped:
            wanted: tuple[int, ...] = experts.num_experts, experts.intermediate_dim, experts.places[family].bank.rank
        else:
            wanted = tuple(getattr(experts, held).shape)
        found = [info.shape for info in stored_lefts(stored, layer, held)]
        if found != [wanted] and found != [wanted[1:]] * wanted[0]:
            told = f"{len(found)} tensors of shapes {sorted(set(found))}"
            raise GlobeError(
                f"layer {layer}: {told} are the left factors of family {family}; expected {list(wanted)} in one "
                f"tensor or in {wanted[0]}: compress again"
            )
