"""The dense checkpoint of a factored directory as one GGUF file, for llama.cpp and what builds on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from globe.artifact.autoload import source_config
from globe.artifact.export import reconstruct
from globe.artifact.factored import Bank, Factored, open_factored
from globe.artifact.gguf_model import Architecture, architecture_of, describe
from globe.artifact.gguf_tokenizer import add_tokenizer, require_tokenizer
from globe.checkpoint.formats.tensors import recalled
from globe.checkpoint.json_file import read_json
from globe.checkpoint.tensorfile import read_tensor
from globe.errors import GlobeError, UsageError
from globe.runs.stages import Display, Stages

TYPES = ("q4_0", "q8_0")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
_BLOCK = 32  # values that share a scale in both types
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def export_gguf(
    source: Path | str,
    target: Path | str,
    gguf_type: str,
    *,
    overwrite: bool = False,
    progress: Display | None = None,
) -> dict[str, Any]:
    """Write Ŵ_i = A_i Σ_j α_ij B_j and all else of a factored directory as a GGUF file, quantised by the gguf package.

    Matrices take `gguf_type`; embeddings and head take q8_0 in any case, and routers, norms and biases fp32. A matrix
    whose rows 32 does not divide takes fp16. One stack of a layer's experts is in memory at a time.

    Parameters
    ----------
    source : Path or str
        A factored directory of an architecture of `globe.artifact.gguf_model.ARCHITECTURES`.
    target : Path or str
        The file; its name ends in .gguf.
    gguf_type : {"q4_0", "q8_0"}
        4.5 or 8.5 bits a weight: integers in groups of 32 with a scale in fp16.
    overwrite : bool
        Replace a file that is there.
    progress : Display, optional
        Shows the stage.

    Returns
    -------
    dict
        `output`, `tensors`, `bytes`, `stages`, `saturated` as in `globe.export`, and `fp16`: the tensors that 32 does
        not divide.

    Raises
    ------
    UsageError
        If the type is not known, the name does not end in .gguf, or the file is there and is not to be replaced.
    GlobeError
        If the source is damaged, gguf is not installed, or llama.cpp would not compute what the source computes: an
        architecture, settings of the model, tensors or a tokenizer that it does not have.
    """
    source, target = Path(source), Path(target)
    _require_target(target, gguf_type, overwrite)
    try:
        import gguf
    except ImportError as error:
        raise GlobeError('writing GGUF needs the gguf package: pip install "globe-moe[gguf]"') from error
    factored = open_factored(source)
    config = source_config(read_json(source / "config.json"))
    architecture = architecture_of(source, config)
    require_tokenizer(source)
    stages = Stages(progress)
    model = _Model(factored, {})
    pieces = _pieces(factored, config, architecture, gguf.GGMLQuantizationType[gguf_type.upper()])
    partial = target.with_name(f".{target.name}.partial")
    writer = gguf.GGUFWriter(partial, architecture.name)
    try:
        describe(writer, config, architecture, gguf.LlamaFileType[f"MOSTLY_{gguf_type.upper()}"])
        add_tokenizer(writer, source, factored.shape(_EMBEDDING)[0])
        for piece in pieces:
            writer.add_tensor_info(piece.name, piece.stored_shape, piece.dtype, piece.nbytes, piece.kind)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with stages.stage("export", len(pieces)) as advance:
            model.banks.update({name: factored.bank(name) for name in factored.manifest["banks"]})
            for piece in pieces:
                writer.write_tensor_data(model.encoded(piece, architecture, config))
                advance(1)
        writer.close()
        partial.replace(target)
    except OSError as error:
        raise GlobeError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return {
        "output": str(target),
        "tensors": len(pieces),
        "bytes": target.stat().st_size,
        "saturated": model.saturated,
        "fp16": [piece.name for piece in pieces if piece.kind == gguf.GGMLQuantizationType.F16],
        "stages": stages.as_list(),
    }


def _require_target(target: Path, gguf_type: str, overwrite: bool) -> None:
    if gguf_type not in TYPES:
        raise UsageError(f"gguf_type {gguf_type!r} is not known; expected one of {', '.join(TYPES)}")
    if target.suffix != ".gguf":
        raise UsageError(f"output {target}: expected a file whose name ends in .gguf")
    if target.is_dir() or (target.exists() and not overwrite):
        raise UsageError(f"output {target} exists; name another file or give --overwrite")
    if not target.parent.is_dir():
        raise UsageError(f"output {target}: there is no directory {target.parent}; make it first")


@dataclass(frozen=True)
class _Piece:
    """A tensor of the file: its name there, the source's tensors that it is stacked of, its shape and type."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Any

    @property
    def dtype(self) -> np.dtype[Any]:
        plain = {"F32": np.float32, "F16": np.float16}
        return np.dtype(plain.get(self.kind.name, np.uint8))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In elements of `dtype`: bytes where it is quantised."""
        if self.dtype != np.uint8:
            return self.shape
        from gguf.quants import quant_shape_to_byte_shape

        return tuple(quant_shape_to_byte_shape(self.shape, self.kind))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.stored_shape)) * self.dtype.itemsize


def _pieces(factored: Factored, config: dict[str, Any], architecture: Architecture, kind: Any) -> list[_Piece]:
    """What the file will hold, in the source's order; a tensor that the architecture lacks is refused."""
    import gguf

    number = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name), None)
    if number is None:
        raise GlobeError(f"this version of gguf does not know the architecture {architecture.name}; update gguf")
    known = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    wide = gguf.GGMLQuantizationType.Q8_0
    found = []
    for name, sources in _stacked(factored):
        wanted = known.get_name(name, (".weight", ".bias"))
        if wanted is None:
            raise GlobeError(f"tensor {name} has no place in GGUF's {architecture.name}: leave out --gguf-type")
        shape = factored.shape(sources[0])
        shape = shape if sources[0] == name else (len(sources), *shape)
        shape = shape[1:] if "ffn_gate_inp_shexp" in wanted else shape  # a vector, which transformers has as 1 × d
        if len(shape) == 1 or "ffn_gate_inp" in wanted:
            chosen = gguf.GGMLQuantizationType.F32
        elif shape[-1] % _BLOCK:
            chosen = gguf.GGMLQuantizationType.F16
        else:
            chosen = wide if name in (_EMBEDDING, _HEAD) else kind
        found.append(_Piece(wanted, sources, shape, chosen))
    if architecture.own_head and not any(piece.sources == (_HEAD,) for piece in found):
        found.append(_Piece("output.weight", (_EMBEDDING,), factored.shape(_EMBEDDING), wide))
    return found


def _stacked(factored: Factored) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names as GGUF's map knows them, experts of a layer under one, and the source's tensors that each is made of."""
    groups: dict[str, dict[int, str]] = {}
    for name in factored.source_tensors:
        match = _EXPERT.fullmatch(name)
        merged, place = (f"{match[1]}.{match[3]}", int(match[2])) if match else (name, 0)
        groups.setdefault(merged, {})[place] = name
    for merged, members in groups.items():
        yield merged, tuple(members[place] for place in sorted(members))


@dataclass
class _Model:
    """The dense tensors of a factored directory, each when asked for; `saturated` counts as in `globe.export`."""

    factored: Factored
    banks: dict[str, Bank]
    saturated: int = 0

    def encoded(self, piece: _Piece, architecture: Architecture, config: dict[str, Any]) -> NDArray[Any]:
        """A tensor as the file has it."""
        from gguf.quants import quantize

        out = np.empty(piece.stored_shape, piece.dtype)
        for place, name in enumerate(piece.sources):
            values = architecture.ordered(piece.name, self._dense(name), config)
            values = values if len(piece.sources) > 1 else values.view(piece.shape)
            if not bool(values.isfinite().all()):
                raise GlobeError(f"tensor {name} holds NaN or Inf; compress the source again")
            (out[place] if len(piece.sources) > 1 else out)[...] = quantize(values.numpy(), piece.kind)
        return out

    def _dense(self, name: str) -> torch.Tensor:
        """A tensor of the source, fp32, as `globe export` writes it."""
        entry = self.factored.source_tensors[name]
        if "encoded" in entry:
            return recalled(name, entry, self.factored.tensors).read().float()
        stored = self.factored.tensors.get(name)
        if stored is not None:
            return read_tensor(stored).float()
        values, beyond = reconstruct(self.factored, self.banks, name, entry)
        self.saturated += beyond
        return values.float()
