"""An expert's matrix from a factored checkpoint, in float32."""

import json

import numpy as np
import safetensors


def read_file(path):
    """The tensors of a safetensors file, by name; bfloat16 is the upper half of a float32."""
    tensors, kinds = {}, {"F32": np.float32, "F16": np.float16, "I32": np.int32, "BF16": np.uint16}
    for name, stored in safetensors.deserialize(path.read_bytes()):
        array = np.frombuffer(stored["data"], kinds.get(stored["dtype"], np.uint8))
        array = (array.astype(np.uint32) << 16).view(np.float32) if stored["dtype"] == "BF16" else array
        tensors[name] = array.reshape(stored["shape"] if stored["dtype"] in kinds else -1)
    return tensors


def read_factor(tensors, name, packed):
    """Values as stored, or integers of some bits times their groups' scales."""
    if packed is None:
        return tensors[name]
    size, scales = packed["bits"], np.repeat(tensors[name + "_scale"], packed["group"], -1)
    bits = np.unpackbits(tensors[name + "_packed"].view(np.uint8), -1, scales.shape[-1] * size, "little")
    return (bits.reshape(*scales.shape, size) @ np.float32(1 << np.arange(size)) - (1 << size - 1)) * scales


def read_expert(out, family, tensor, expert=0):
    """W = A @ sum_j codes_j atoms_j of a source tensor, or of the given expert in a fused one; out is a Path."""
    manifest, index = (json.loads((out / f"globe{end}.json").read_text()) for end in ("", ".safetensors.index"))
    record, left = manifest["families"][family], f"{tensor}.globe_{family}_left"
    packed, bank, stored = record.get("packed"), record["banks"][tensor], read_file(out / "globe-bank.safetensors")
    atoms = read_factor(stored, f"globe.{bank}.atoms", manifest["banks"][bank].get("packed"))
    row = slice(*stored[f"globe.{bank}.codes.indptr"][record["tensors"][tensor][expert] :][:2])
    indices, values = (stored[f"globe.{bank}.codes.{part}"][row] for part in ("indices", "values"))
    lefts = read_factor(read_file(out / index["weight_map"][left + "_packed" * bool(packed)]), left, packed)
    rows = np.tensordot(values, atoms[indices], 1)
    basis = np.linalg.solve(np.linalg.cholesky(np.float64(rows) @ rows.T), rows) if packed else rows
    matrix = lefts.reshape(-1, *lefts.shape[-2:])[expert] @ np.float32(basis)
    return matrix.T if family == "down" else matrix
