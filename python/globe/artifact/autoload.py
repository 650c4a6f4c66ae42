"""What makes transformers load a factored directory through GloBE, and refuse it without.

config.json gets three entries. `quantization_config` names the method, the index of the weight files, the place of
every expert in its bank, and which factors are packed. `auto_map` names a file beside it that imports GloBE, for
`trust_remote_code=True`. `transformers_weights` holds no file name but the remedy: `globe.hf` puts the index in its
place, and transformers alone ends with an error that shows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from globe.checkpoint.companions import LOADER_FILE
from globe.checkpoint.formats.left_out import leaving_out, modules_of
from globe.checkpoint.layouts import read_layouts
from globe.checkpoint.quantised import KEY, quantised_dtypes, quantization_of, with_quantization
from globe.errors import GlobeError

METHOD = "globe"
REMEDY = "this checkpoint is factored by GloBE: pip install 'globe-moe[hf]', then import globe.hf first"
LOADER = '''"""Loads this checkpoint, which GloBE factored, with from_pretrained(..., trust_remote_code=True)."""

try:
    from globe.hf.remote import GlobeForCausalLM, GlobeModelConfig
except ImportError as error:
    raise ImportError("this checkpoint is factored by GloBE: pip install 'globe-moe[hf]'") from error

__all__ = ["GlobeForCausalLM", "GlobeModelConfig"]
'''


def loading_config(
    config: dict[str, Any], manifest: dict[str, Any], index: str, decoded: Iterable[str] = ()
) -> dict[str, Any]:
    """config.json of a factored directory, made of the source's and of globe.json.

    `decoded` are the tensors of experts that are stored as codes, and decoded in an export.
    """
    quantization: dict[str, Any] = {
        "quant_method": METHOD,
        "format_version": manifest["format_version"],
        "experts": _places(manifest),
    }
    packed = {part: _packed(manifest[named]) for part, named in (("lefts", "families"), ("atoms", "banks"))}
    if any(packed.values()):
        quantization["packed"] = packed
    dtypes = (entry["dtype"] for shard in manifest["source"]["shards"] for entry in shard["tensors"].values())
    replaced: dict[str, Any] = {key: config[key] for key in ("auto_map", "transformers_weights") if key in config}
    stated, bare, modules = quantization_of(config), with_quantization(config, None), modules_of(decoded)
    if quantised_dtypes(dtypes) and stated is not None:
        kept = leaving_out(stated, modules) if modules and isinstance(stated, dict) else stated
        told = with_quantization(config, kept)
        replaced |= {key: value for key, value in told.items() if bare.get(key) != value}
    if replaced:
        quantization["replaced"] = replaced
    return marked(bare, quantization, index)


def marked(config: dict[str, Any], quantization: dict[str, Any], weights: str) -> dict[str, Any]:
    """A config.json with the three entries; `weights` is the file or index that `globe.hf` is to load."""
    module = LOADER_FILE.removesuffix("py")
    return {
        **config,
        "auto_map": {"AutoConfig": module + "GlobeModelConfig", "AutoModelForCausalLM": module + "GlobeForCausalLM"},
        "transformers_weights": REMEDY,
        "quantization_config": {**quantization, "weights": weights},
    }


def source_config(config: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json, from that of a factored directory; without a quantization_config that nothing needs."""
    ours = ("auto_map", "transformers_weights", KEY)
    quantization = config.get(KEY)
    replaced = quantization.get("replaced") if isinstance(quantization, dict) else None
    return {key: value for key, value in config.items() if key not in ours} | (replaced or {})


def _places(manifest: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Per family and layer [bank, first, step]: the e-th expert of the layer has row first + step · e of the codes."""
    layout = next(layout for layout in read_layouts() if layout.name == manifest["source"]["layout"])
    places: dict[str, dict[str, list[Any]]] = {}
    for family, described in manifest["families"].items():
        found: dict[int, dict[int, tuple[str, int]]] = {}
        for tensor, numbers in described["tensors"].items():
            place = layout.place(family, tensor)
            if place is None:
                raise GlobeError(f"tensor {tensor} does not belong to family {family} of layout {layout.name}")
            bank, first = described.get("banks", {}).get(tensor, family), place[1] or 0
            layer = found.setdefault(place[0], {})
            layer.update({first + e: (bank, number) for e, number in enumerate(numbers)})
        places[family] = {str(layer): _evenly(family, layer, experts) for layer, experts in sorted(found.items())}
    return places


def _packed(described: dict[str, Any]) -> dict[str, Any]:
    """Bits and group of the factors that are packed, by the name of the family or bank."""
    return {name: told["packed"] for name, told in described.items() if "packed" in told}


def _evenly(family: str, layer: int, experts: dict[int, tuple[str, int]]) -> list[Any]:
    rows = [experts[e][1] for e in sorted(experts)]
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = step > 0 and rows == list(range(rows[0], rows[0] + step * len(rows), step))
    if not even or len({bank for bank, _ in experts.values()}) != 1:
        raise GlobeError(f"family {family}: the experts of layer {layer} do not follow each other in one bank")
    return [experts[min(experts)][0], rows[0], step]
