"""From a dense checkpoint to a factored one and back, and a plain NumPy reader of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402
from safetensors import deserialize  # noqa: E402

from checkpoints import make_tiny  # noqa: E402
from families import WEIGHTS_ONLY, WEIGHTS_ONLY_OPTIONS  # noqa: E402
from globe.checkpoint.layouts import FAMILIES  # noqa: E402
from globe.cli import cli  # noqa: E402

TEXT = "A mixture holds many experts; a router chooses a few of them for every token. " * 4
# Seeds from which two loops make headway, where grouped-subspace's take more.
SMALL: dict[str, Any] = {
    "rank": 0.5,
    "bank_size": 3,
    "outer_loops": 2,
    "method": "ts-pca",
    "device": "cpu",
    **WEIGHTS_ONLY,
}
ALL = ("--families", "gate,up,down")
SMALL_OPTIONS = (
    "--rank",
    "0.5",
    "--bank-size",
    "3",
    "--outer-loops",
    "2",
    "--method",
    "ts-pca",
    "--device",
    "cpu",
    *WEIGHTS_ONLY_OPTIONS,
)


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: its dtype name and shape, raw bytes, and its place among the file's tensors."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    def values(self) -> np.ndarray:
        if self.dtype == "BF16":
            return (np.frombuffer(self.raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        kinds = {"F16": np.float16, "F32": np.float32, "I32": np.int32}
        return np.frombuffer(self.raw, kinds[self.dtype]).reshape(self.shape)


def read_directory(directory: Path) -> dict[str, Stored]:
    """Read every tensor of every safetensors file, in the order of their bytes."""
    tensors: dict[str, Stored] = {}
    for file in sorted(directory.glob("*.safetensors")):
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header.pop("__metadata__", None)
        entries = dict(deserialize(content))
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            entry = entries[name]
            tensors[name] = Stored(file.name, entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return tensors


def dense_experts(out: Path) -> dict[str, np.ndarray]:
    """Recompute A_i Σ_j α_ij B_j of every compressed tensor of OUT, in fp64 and from its files alone.

    A fused tensor comes back whole, with the half that was not compressed as it is stored.
    """
    stored = read_directory(out)
    manifest = json.loads((out / "globe.json").read_text(encoding="utf-8"))
    halves: dict[str, dict[str, np.ndarray]] = {}
    for family, described in manifest["families"].items():
        for tensor, numbers in described["tensors"].items():
            bank = described["banks"][tensor]
            part = {key: stored[f"globe.{bank}.{key}"].values() for key in ("atoms", "codes.indptr", "codes.indices")}
            atoms, values = part["atoms"].astype(np.float64), stored[f"globe.{bank}.codes.values"].values()
            lefts = stored[f"{tensor}.globe_{family}_left"].values().astype(np.float64)
            lefts = lefts if lefts.ndim == 3 else lefts[None]
            products = []
            for left, number in zip(lefts, numbers, strict=True):
                first, last = part["codes.indptr"][number : number + 2]
                mixture = sum(float(values[k]) * atoms[part["codes.indices"][k]] for k in range(int(first), int(last)))
                products.append(left @ mixture)
            stacked = np.stack(products)
            halves.setdefault(tensor, {})[family] = stacked.transpose(0, 2, 1) if family == "down" else stacked
            other = {"gate": "up", "up": "gate"}.get(family)
            rest = f"{tensor}.globe_{other}_dense"
            if rest in stored:
                halves[tensor][other] = stored[rest].values().astype(np.float64)
    return {
        tensor: np.concatenate([parts[family] for family in FAMILIES if family in parts], 1)
        for tensor, parts in halves.items()
    }


def run_cli(*arguments: object) -> dict[str, Any]:
    """Run a subcommand with --json -q, and return the one object on its stdout."""
    done = CliRunner().invoke(cli, [*map(str, arguments), "--json", "-q"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass(frozen=True)
class Trip:
    """A source, its factored directory, the dense export made after the source was moved away, and the metrics."""

    source: Path
    out: Path
    dense: Path
    metrics: dict[str, Any]
    exported: dict[str, Any]


def travel(root: Path, source: Path, *options: object) -> Trip:
    metrics = run_cli("compress", source, root / "out", *options)
    kept = source.rename(root / "kept")
    exported = run_cli("export", root / "out", root / "dense")
    return Trip(kept, root / "out", root / "dense", metrics, exported)


def check_round_trip(trip: Trip) -> None:
    """Check the export's structure, its untouched tensors, and its expert tensors against the NumPy reader."""
    before, after = read_directory(trip.source), read_directory(trip.dense)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert (after[name].file, after[name].dtype, after[name].shape) == (tensor.file, tensor.dtype, tensor.shape)
    experts = dense_experts(trip.out)
    assert experts
    for name, tensor in after.items():
        if name not in experts:
            assert tensor.raw == before[name].raw, name
            continue
        wanted = experts[name].reshape(tensor.shape)
        step = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}[tensor.dtype]
        slack = 1e-6 * np.abs(wanted).max() + 1.01 * step * np.abs(wanted)
        assert (np.abs(tensor.values().astype(np.float64) - wanted) <= slack).all(), name
    index = "model.safetensors.index.json"
    assert (trip.dense / index).exists() == (trip.source / index).exists()
    if (trip.source / index).exists():
        ours, theirs = (json.loads((place / index).read_text()) for place in (trip.dense, trip.source))
        assert ours["metadata"] == theirs["metadata"]
        assert ours["weight_map"] == theirs["weight_map"]
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (trip.dense, trip.source))
    assert ours == theirs
    assert (trip.dense / "tokenizer.json").read_bytes() == (trip.source / "tokenizer.json").read_bytes()
    assert trip.exported["tensors"] == len(before)
    assert trip.exported["bytes"] == sum(len(tensor.raw) for tensor in before.values())
    assert not [entry for entry in trip.out.iterdir() if entry.name.startswith(".")]


def relative_errors(trip: Trip) -> dict[str, float]:
    """Σ‖W − Ŵ‖² / Σ‖W‖² of each family, from the files of source and OUT."""
    source, experts = read_directory(trip.source), dense_experts(trip.out)
    manifest = json.loads((trip.out / "globe.json").read_text(encoding="utf-8"))
    found = {}
    for family, described in manifest["families"].items():
        error = energy = 0.0
        for tensor in described["tensors"]:
            weights = source[tensor].values().astype(np.float64)
            fitted = experts[tensor].reshape(weights.shape)
            if weights.ndim == 3 and family != "down":
                half = weights.shape[1] // 2
                rows = slice(0, half) if family == "gate" else slice(half, None)
                weights, fitted = weights[:, rows], fitted[:, rows]
            error += float(((weights - fitted) ** 2).sum())
            energy += float((weights**2).sum())
        found[family] = error / energy
    return found


def load_plain(directory: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not found[problem], problem
    return model


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.glob("*.safetensors*"))
    }


def traveller(folders: pytest.TempPathFactory) -> Callable[..., Trip]:
    """Makes round trips of tiny checkpoints, each once."""
    made: dict[tuple[Any, ...], Trip] = {}

    def make(layout: str, *options: object, dtype: str = "bfloat16", shards: int = 2) -> Trip:
        key = (layout, options, dtype, shards)
        if key not in made:
            root = folders.mktemp(layout)
            source = make_tiny(layout, root / "source", dtype=dtype, shards=shards)
            made[key] = travel(root, source, *SMALL_OPTIONS, *options)
        return made[key]

    return make
