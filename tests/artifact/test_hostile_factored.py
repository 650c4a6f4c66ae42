"""Directories that cannot be exported or evaluated: not factored, not whole, or not what their manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe.artifact.export import export  # noqa: E402
from globe.artifact.factored import open_factored  # noqa: E402
from globe.choice.inspect import inspect  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.pipeline.compress import compress  # noqa: E402
from globe.settings import Settings  # noqa: E402
from refusals import edit_json, edit_tensor, in_process, json_variants, refusal  # noqa: E402

LEFT = "model.layers.1.mlp.experts.5.gate_proj.weight.globe_gate_left"
SHARD = "globe-00002-of-00002.safetensors"
BANK = "globe-bank.safetensors"
SETTINGS = Settings(rank=0.5, bank_size=3, outer_loops=1, device="cpu", **WEIGHTS_ONLY)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("olmoe", tmp_path_factory.mktemp("olmoe") / "source", shards=2)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(source, tmp_path_factory.mktemp("finished") / "out", SETTINGS).directory


@pytest.fixture
def factored(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "factored"))


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda directory: edit_json(directory / "globe.json", change)


def bank(part: str, place: int, value: float) -> Callable[[Path], object]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return lambda directory: edit_tensor(directory, f"globe.gate.{part}", change)


def poisoned_left(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


# Each: what is done to the factored directory, and the words that the error must have.
DAMAGED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda directory: (directory / "config.json").unlink(), ("config.json", "did not finish")),
    "config not JSON": (cut("config.json", 10), ("config.json", "not valid JSON")),
    "manifest cut off": (cut("globe.json", 1000), ("globe.json", "not valid JSON")),
    "manifest empty": (lambda directory: (directory / "globe.json").write_text("{}"), ("globe.json", "version None")),
    "newer format": (manifest(lambda value: value.update(format_version=5)), ("format version 5", "update")),
    "no families": (manifest(lambda value: value.update(families={})), ("globe.json", "families are []")),
    "another family": (manifest(lambda value: value["families"].update(router={})), ("globe.json", "'router'")),
    "no shards": (manifest(lambda value: value["source"].pop("shards")), ("globe.json", "shards")),
    "shard outside": (manifest(lambda value: value["source"]["shards"][0].update(file="../../escaped.safetensors")),
                      ("globe.json", "'../../escaped.safetensors'")),
    "shard over config": (manifest(lambda value: value["source"]["shards"][0].update(file="config.json")),
                          ("globe.json", "'config.json'")),
    "expert beyond the codes": (manifest(lambda value: value["families"]["gate"]["tensors"].update(
        {LEFT.removesuffix(".globe_gate_left"): [16]})), ("globe.json", "bank gate has 16 experts")),
    "bank of another family": (manifest(lambda value: value["families"]["gate"]["banks"].update(
        {LEFT.removesuffix(".globe_gate_left"): "up"})), ("globe.json", "family gate has 3 atoms")),
    "bank of nobody": (manifest(lambda value: value["families"]["gate"]["banks"].update(
        {LEFT.removesuffix(".globe_gate_left"): "none"})), ("globe.json", "'none'")),
    "tensor left out": (manifest(lambda value: value["source"]["shards"][0]["tensors"].pop("lm_head.weight")),
                        ("globe.json", "it does not name tensor lm_head.weight")),
    "shape beyond memory": (manifest(lambda value: value["source"]["shards"][0]["tensors"]["lm_head.weight"].update(
        shape=[1 << 50, 64])), ("lm_head.weight", f"[{1 << 50}, 64]", "[264, 64]")),
    "missing shard": (lambda directory: (directory / SHARD).unlink(), (SHARD, "cannot be read")),
    "truncated shard": (cut(SHARD, -1), (SHARD, "truncated")),
    "missing bank": (lambda directory: (directory / BANK).unlink(), (BANK, "cannot be read")),
    "left factor of another rank": (lambda directory: edit_tensor(directory, LEFT, lambda left: left[:, :15]),
                                    (SHARD, LEFT, "[32, 15]", "[32, 16]")),
    "left factor in fp32": (lambda directory: edit_tensor(directory, LEFT, lambda left: left.float()),
                            (LEFT, "F32", "BF16")),
    "left factor with NaN": (lambda directory: edit_tensor(directory, LEFT, poisoned_left), (SHARD, LEFT, "NaN")),
    "atom with Inf": (bank("atoms", 5, float("inf")), (BANK, "globe.gate.atoms", "finite")),
    "code with NaN": (bank("codes.values", 0, float("nan")), (BANK, "globe.gate.codes.values", "finite")),
    "index past the atoms": (bank("codes.indices", 0, 3), (BANK, "globe.gate.codes.indices", "0 to 2")),
    "index far past the atoms": (bank("codes.indices", 0, 2**31 - 1), ("globe.gate.codes.indices", "0 to 2")),
    "negative index": (bank("codes.indices", 0, -1), ("globe.gate.codes.indices", "0 to 2")),
    "offsets past the codes": (bank("codes.indptr", -1, 2**31 - 1), ("globe.gate.codes.indptr", "ascending")),
    "offsets that descend": (bank("codes.indptr", 1, -(2**31)), ("globe.gate.codes.indptr", "ascending")),
    "offsets that begin late": (bank("codes.indptr", 0, 1), ("globe.gate.codes.indptr", "ascending")),
    "an offset too few": (lambda directory: edit_tensor(directory, "globe.gate.codes.indptr", lambda rows: rows[:-1]),
                          ("globe.gate.codes.indptr", "[16]", "[17]")),
    "a code too few": (lambda directory: edit_tensor(directory, "globe.gate.codes.values", lambda codes: codes[:-1]),
                       ("globe.gate.codes.values", "promises")),
}  # fmt: skip
PROCESSES = {"index far past the atoms"}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_factored_directory(case: str, factored: Path, tmp_path: Path) -> None:
    damage, words = DAMAGED[case]
    damage(factored)
    line = refusal(1, "export", factored, tmp_path / "dense", process=case in PROCESSES)
    for word in words:
        assert word in line
    assert not (tmp_path / "dense").exists()
    assert not (tmp_path.parent / "escaped.safetensors").exists()


def test_the_undamaged_directory_is_exported(factored: Path, tmp_path: Path) -> None:
    done = in_process("export", factored, tmp_path / "dense", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "dense" / "config.json").exists()


def test_version_1_is_read(factored: Path, tmp_path: Path) -> None:
    export(factored, tmp_path / "dense")

    def older(value: dict[str, Any]) -> None:
        value["format_version"] = 1
        del value["banks"]
        for family in value["families"].values():
            del family["banks"]

    manifest(older)(factored)
    export(factored, tmp_path / "again")
    for file in (tmp_path / "dense").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("metadata", [None, [1], "text"])
def test_index_without_metadata(metadata: object, source: Path, tmp_path: Path) -> None:
    """An index with odd metadata is an index all the same, and the export has one."""
    odd = Path(shutil.copytree(source, tmp_path / "odd"))
    edit_json(odd / "model.safetensors.index.json", lambda value: value.update(metadata=metadata))
    export(compress(odd, tmp_path / "out", SETTINGS).directory, tmp_path / "dense")
    assert inspect(tmp_path / "dense")["families"] == inspect(source)["families"]


def test_one_wrong_value_in_the_manifest(factored: Path, source: Path, tmp_path: Path) -> None:
    """Whatever single value is replaced, the directory is refused before anything is written, or exported in full."""
    path = factored / "globe.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    read = {key: whole[key] for key in ("format_version", "families", "banks", "source")}
    accepted: dict[str, Any] = {}
    refused = 0
    for what, variant in json_variants(read, (None, -1, 1 << 60, "../x", [], [[]]), most=8):
        path.write_text(json.dumps(variant), encoding="utf-8")
        try:
            open_factored(factored)
            accepted.setdefault(what.partition(" = ")[0], variant)
        except GlobeError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
    assert refused > 400
    told = ("source/path", "source/layout", "source/fingerprint", "source/index_metadata", "source/shards/")
    assert [place for place in accepted if not place.startswith(told)] == []
    assert [place for place in accepted if any(word in place for word in ("/shape", "/dtype", "/file"))] == []
    for variant in accepted.values():
        path.write_text(json.dumps(variant), encoding="utf-8")
        export(factored, tmp_path / "dense", overwrite=True)
        assert inspect(tmp_path / "dense")["families"] == inspect(source)["families"]


def nothing(directory: Path) -> None:
    """Leave the path free."""


def empty(directory: Path) -> None:
    directory.mkdir()


def a_file(directory: Path) -> None:
    directory.write_text("text", encoding="utf-8")


@pytest.mark.parametrize("make", [nothing, empty, a_file])
@pytest.mark.parametrize("reader", ["inspect", "eval", "export", "compress"])
def test_wrong_directory(reader: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "wrong")
    out = [tmp_path / "out"] if reader in ("export", "compress") else []
    line = refusal(1, reader, tmp_path / "wrong", *out)
    assert str(tmp_path / "wrong") in line
    assert ("globe.json" if reader == "export" else "config.json" if make is empty else "no such directory") in line
    assert not (tmp_path / "out").exists()


def test_a_dense_directory_is_not_exported(source: Path, tmp_path: Path) -> None:
    assert "globe.json" in refusal(1, "export", source, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("reader", ["inspect", "compress"])
def test_a_factored_directory_is_no_source(reader: str, finished: Path, tmp_path: Path) -> None:
    out = [tmp_path / "out"] if reader == "compress" else []
    assert "factored checkpoint already" in refusal(1, reader, finished, *out)
    assert not (tmp_path / "out").exists()


def smaller_vocabulary(directory: Path) -> None:
    edit_json(directory / "config.json", lambda value: value.update(vocab_size=100))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_tensor(directory, name, lambda weights: weights[:100])


def config(**changes: object) -> Callable[[Path], object]:
    return lambda directory: edit_json(directory / "config.json", lambda value: value.update(changes))


# Each: what is done to a dense checkpoint, the words that the error of `globe eval` must have, and whether in a process
# of its own, because transformers writes to the standard error that it found when it was imported.
UNREADABLE: dict[str, tuple[Callable[[Path], object], tuple[str, ...], bool]] = {
    "truncated shard": (cut("model-00002-of-00002.safetensors", -1), ("model-00002", "truncated"), False),
    "another vocabulary in config": (config(vocab_size=300), ("lm_head.weight", "[264, 64]", "[300, 64]"), True),
    "unknown architecture": (config(model_type="nonesuch"), ("cannot load", "`nonesuch`"), False),
    "division by zero in the model": (config(num_attention_heads=0), ("cannot load",), False),
    "tokenizer of another model": (smaller_vocabulary, ("the tokenizer gives token", "knows 100"), False),
    "tokenizer not JSON": (cut("tokenizer.json", 50), ("tokenizer cannot be loaded",), False),
    "no tokenizer": (lambda directory: [(directory / f"tokenizer{part}.json").unlink() for part in ("", "_config")],
                     ("no tokenizer", "tokenizer.json"), False),
    "NaN": (lambda directory: edit_tensor(directory, "lm_head.weight", lambda weights: weights * float("nan")),
            ("not finite",), False),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_eval_of_a_damaged_dense_checkpoint(case: str, source: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(source, tmp_path / "dense"))
    damage, words, process = UNREADABLE[case]
    damage(directory)
    line = refusal(1, "eval", directory, "--max-tokens", "64", process=process)
    for word in words:
        assert word in line


def test_eval_of_a_damaged_factored_directory(factored: Path, tmp_path: Path) -> None:
    bank("codes.indices", 0, 3)(factored)
    assert "globe.gate.codes.indices" in refusal(1, "eval", factored, process=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["factored"]


def test_eval_of_a_factored_directory_against_nothing(finished: Path) -> None:
    assert "/nonexistent" in refusal(1, "eval", finished, "--against", "/nonexistent", "--max-tokens", "64")


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--threads", "0"), 2, ("--threads", "1<=x<=4096")),
        (("--window", "1"), 2, ("window", "2")),
        (("--max-tokens", "-5"), 2, ("max tokens", "-5")),
        (("--text", "/nonexistent"), 2, ("/nonexistent", "No such file")),
        (("--text", "{directory}/model-00001-of-00002.safetensors"), 1, ("not UTF-8",)),
        (("--text", "{directory}"), 2, ("Is a directory",)),
    ],
)
def test_options_of_eval(options: tuple[str, str], status: int, words: tuple[str, ...], source: Path) -> None:
    line = refusal(status, "eval", source, options[0], options[1].format(directory=source))
    for word in words:
        assert word in line
