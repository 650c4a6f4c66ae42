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


def read_expert(out, family, tensor, expert=0):
    """W = A @ sum_j codes_j atoms_j of a source tensor, or of the given expert in a fused one; out is a Path."""
    record = json.loads((out / "globe.json").read_text())["families"][family]
    left, bank = f"{tensor}.globe_{family}_left", f"globe.{record['banks'][tensor]}."
    stored = read_file(out / "globe-bank.safetensors")
    file = json.loads((out / "globe.safetensors.index.json").read_text())["weight_map"][left]
    row = slice(*stored[bank + "codes.indptr"][record["tensors"][tensor][expert] :][:2])
    indices, values = stored[bank + "codes.indices"][row], stored[bank + "codes.values"][row]
    lefts = read_file(out / file)[left]
    matrix = lefts.reshape(-1, *lefts.shape[-2:])[expert] @ np.tensordot(values, stored[bank + "atoms"][indices], 1)
    return matrix.T if family == "down" else matrix
