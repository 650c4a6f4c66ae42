"""The C library against the Python package: what it reads, what it refuses, and what experts make of tokens."""

import copy
import ctypes
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import architectures  # noqa: E402
import codes  # noqa: E402
import globe  # noqa: E402
import libglobe  # noqa: E402
from checkpoint.test_header_fuzz import DAMAGES, damaged  # noqa: E402
from checkpoints import FUSED_ON_DISK, make_tiny  # noqa: E402
from families import WEIGHTS_ONLY  # noqa: E402
from globe.artifact.factored import BANK_FILE, open_factored  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.hf.cache import MixtureCache  # noqa: E402
from refusals import edit_json, json_variants  # noqa: E402

HEADER = Path(__file__).parent.parent / "cpp" / "include" / "globe" / "globe.h"
SMALL = {"rank": 0.5, "bank_size": 3, "outer_loops": 1, "device": "cpu", **WEIGHTS_ONLY}
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}
# Names of one matrix each, w1 w2 w3, and fused; families that are factored, and how they share banks.
CASES = {
    "olmoe": {"families": ("gate", "up")},
    "mixtral": {"families": ("gate", "up", "down"), "scope": "layer"},
    next(iter(FUSED_ON_DISK)): {"families": ("up", "down")},
}


def factor(layout, directory, **settings):
    """Compress a tiny checkpoint of a layout; the factored directory and its dense export."""
    source = make_tiny(layout, directory / "source", shards=2)
    globe.compress(source, directory / "out", globe.Settings(**SMALL, **settings))
    globe.export(directory / "out", directory / "dense")
    return directory / "out", directory / "dense"


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    return factor(request.param, tmp_path_factory.mktemp(request.param), **CASES[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return factor("olmoe", tmp_path_factory.mktemp("plain"), **CASES["olmoe"])[0]


@pytest.fixture
def factored(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "factored"))


def keep_half(source):
    """Leave every other expert of eight, under its own number."""
    tensors = load_file(source / "model.safetensors")
    for name in list(tensors):
        found = re.search(r"\.experts\.(\d+)\.", name)
        if found and int(found[1]) % 2 == 0:
            del tensors[name]
        elif name.endswith("mlp.gate.weight"):
            tensors[name] = tensors[name][1::2].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(source / "config.json", lambda config: config.update(num_local_experts=4))
    return source


def dense_experts(directory):
    """Per (layer, expert) the matrices of a dense checkpoint, gate and up (p, d), down (d, p), in float64."""
    checkpoint, found = Checkpoint(directory), {}
    for family in libglobe.FAMILIES:
        for expert in checkpoint.family(family).experts:
            matrix = expert.read((0, expert.matrix[0])).double()
            found.setdefault((expert.layer, expert.expert), []).append(matrix.mT if family == "down" else matrix)
    return found


def product_of(matrix, mixture, family):
    """A factored matrix as the model has it; down's factors are those of its transpose."""
    product = libglobe.array_of(matrix.stored).astype(mixture.dtype) @ mixture
    return product.T if family == "down" else product


def expert_of(matrices, tokens, activation="silu"):
    gate, up, down = matrices
    x = torch.from_numpy(tokens.astype(np.float64))
    return ((ACTIVATIONS[activation](x @ gate.mT) * (x @ up.mT)) @ down.mT).numpy()


def error(found, expected):
    return np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)


def tokens_of(count, width, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def test_versions_agree():
    text = HEADER.read_text(encoding="utf-8")
    parts = [re.search(rf"GLOBE_VERSION_{part} (\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH")]
    assert re.search(r'define GLOBE_VERSION "(.+)"', text)[1] == ".".join(parts) == globe.__version__
    assert libglobe.library().globe_version().decode() == globe.__version__


def test_it_shows_its_interface_and_nothing_else():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-D", "--defined-only", libglobe.path()]
    shown = {line.split()[-1] for line in subprocess.check_output(command, text=True).splitlines()}
    declared = set(re.findall(r"GLOBE_API .*?\b(globe_\w+)\(", HEADER.read_text(encoding="utf-8")))
    ours = {name for name in shown if not re.match(r"_ZT[IVS]?N5globe|_ZNK?5globe|_Z\w*N5globe", name)}
    assert ours == declared and len(declared) > 20
    assert not [name for name in shown if "nlohmann" in name or ("6detail" in name and "run_tasks" not in name)]


def test_every_header_s_functions_are_shown():
    """A function of a header without GLOBE_API is hidden, and found by nobody until a program is linked."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-DC", "--defined-only", libglobe.path()]
    lines = subprocess.check_output(command, text=True).splitlines()
    shown = {name for line in lines for name in re.findall(r"\w+", line.partition("(")[0])}
    declared = {}
    for header in sorted(HEADER.parent.glob("*.hpp")):
        text = re.sub(r"//.*", "", header.read_text(encoding="utf-8"))
        # What has no body lies in the library.
        form = r"^(?!#|inline|struct|class|enum|using)[\w:<> ]*?[ >](\w+)\((?:[^;{}]|{})*?\);"
        declared[header.name] = {match[1] for match in re.finditer(form, text, re.MULTILINE)}
    assert declared["qmatmul.hpp"] == {"qmatmul"} and declared["compose_matmul.hpp"] == {"compose_matmul"}
    assert {name for name, functions in declared.items() if not functions} == {"globe.hpp", "view.hpp"}
    for name, functions in declared.items():
        assert functions <= shown, name


def test_it_lists_what_the_directory_holds(pair):
    out, dense = pair
    factored, opened, source = open_factored(out), libglobe.Checkpoint(out), Checkpoint(dense)
    places = {(e.layer, e.expert) for e in source.family("gate").experts}
    assert {(layer, e) for layer in opened.layers() for e in range(opened.experts(layer))} == places
    assert opened.layers() == sorted({layer for layer, _ in places}) and opened.experts(99) == 0
    for bank in opened.banks():
        theirs = factored.bank(bank.name.decode())
        atoms = libglobe.array_of(bank.atoms).astype(np.float32).reshape(theirs.atoms.shape)
        assert np.array_equal(atoms, theirs.atoms.numpy())
        assert np.array_equal(bank.indptr[: bank.experts + 1], theirs.codes.indptr)
        assert np.array_equal(bank.indices[: bank.nonzeros], theirs.codes.indices)
        assert np.array_equal(bank.values[: bank.nonzeros], theirs.codes.data)


def test_matrices_are_those_of_the_export(pair):
    out, dense = pair
    opened, experts = libglobe.Checkpoint(out), dense_experts(dense)
    names = [bank.name.decode() for bank in opened.banks()]
    manifest = json.loads((out / "globe.json").read_text())
    kinds = set()
    for (layer, expert), matrices in experts.items():
        for family, expected in zip(libglobe.FAMILIES, matrices, strict=True):
            matrix = opened.matrix(family, layer, expert)
            kinds.add((family, matrix.bank >= 0))
            if matrix.bank >= 0:
                mixture = open_factored(out).bank(names[matrix.bank]).mixture(matrix.row).numpy()
                np.testing.assert_allclose(opened.compose(matrix), mixture, rtol=1e-6, atol=1e-6)
                found = product_of(matrix, mixture, family).astype(ml_dtypes.bfloat16)
            else:
                found = libglobe.array_of(matrix.stored)
            np.testing.assert_allclose(found.astype(np.float32), expected.numpy(), rtol=2**-7, atol=1e-6)
    assert kinds == {(family, family in manifest["families"]) for family in libglobe.FAMILIES}


def test_numbers_with_gaps_follow_each_other(tmp_path):
    """Of a pruned source: the export read in its order is what the library holds as experts 0 to 3."""
    out, dense = tmp_path / "out", tmp_path / "dense"
    source = keep_half(make_tiny("qwen3_moe", tmp_path / "source"))
    globe.compress(source, out, globe.Settings(**SMALL, families=("gate", "up")))
    globe.export(out, dense)
    opened, experts = libglobe.Checkpoint(out), dense_experts(dense)
    assert [opened.experts(layer) for layer in opened.layers()] == [4, 4]
    assert {(layer, e) for layer in opened.layers() for e in range(4)} == experts.keys()
    tokens = tokens_of(5, 64)
    for place, matrices in experts.items():
        assert error(opened.forward(place, tokens, "silu"), expert_of(matrices, tokens, "silu")) < 3 * 2**-8


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_are_those_of_the_export(pair, activation):
    """Within bf16 rounding of the export's three matrices, and to fp32 rounding of the factors themselves."""
    out, dense = pair
    opened = libglobe.Checkpoint(out)
    banks = [bank.name.decode() for bank in opened.banks()]
    tokens, held = tokens_of(5, 64), {name: open_factored(out).bank(name) for name in banks}
    for (layer, expert), matrices in dense_experts(dense).items():
        found = opened.forward((layer, expert), tokens, activation)
        assert error(found, expert_of(matrices, tokens, activation)) < 3 * 2**-8
        exact = []
        for family, rounded in zip(libglobe.FAMILIES, matrices, strict=True):
            matrix = opened.matrix(family, layer, expert)
            if matrix.bank >= 0:
                mixture = held[banks[matrix.bank]].mixture(matrix.row).double().numpy()
                rounded = torch.from_numpy(product_of(matrix, mixture, family))
            exact.append(rounded)
        assert error(found, expert_of(exact, tokens, activation)) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tokens_and_outputs_of_16_bits(plain, dtype):
    opened, kind = libglobe.Checkpoint(plain), libglobe.NUMPY[libglobe.DTYPES[dtype]]
    tokens = tokens_of(4, 64).astype(kind)
    wide = opened.forward((1, 3), tokens.astype(np.float32))
    assert np.array_equal(opened.forward((1, 3), tokens), wide)
    assert np.array_equal(opened.forward((1, 3), tokens, dtype=kind), wide.astype(kind))


def test_bits_depend_on_nothing_else(pair):
    opened = libglobe.Checkpoint(pair[0])
    layer = opened.layers()[-1]
    tokens = tokens_of(150, 64)
    expected = opened.forward((layer, 1), tokens)
    cache = libglobe.Cache(1 << 20)
    for _ in range(2):
        assert np.array_equal(opened.forward((layer, 1), tokens, cache=cache), expected)
    assert cache.stats().misses == cache.stats().entries > 0 and cache.stats().hits > 0
    assert np.array_equal(opened.forward((layer, 1), tokens, threads=2), expected)
    assert np.array_equal(opened.forward((layer, 1), tokens[149:]), expected[149:])
    halves = libglobe.Cache(1 << 20, "bfloat16")
    assert error(opened.forward((layer, 1), tokens, cache=halves), expected) < 2**-7


def test_the_cache_is_the_python_one(plain):
    """Whatever is asked of both, they hold the same, in the same order, and count the same."""
    opened, rng = libglobe.Checkpoint(plain), random.Random(7)
    matrices = [opened.matrix(family, layer, e) for family in ("gate", "up") for layer in (0, 1) for e in range(8)]
    one = 16 * 64 * 4
    ours, theirs = libglobe.Cache(5 * one + 1), MixtureCache(5 * one + 1)
    for _ in range(3000):
        chance = rng.random()
        if chance < 0.02:
            budget = rng.choice((one - 1, 3 * one, 5 * one, 9 * one + 7))
            libglobe.call("cache_resize", ours.handle, ctypes.c_size_t(budget))
            theirs.resize(budget)
        elif chance < 0.025:
            libglobe.call("cache_clear", ours.handle)
            theirs.clear()
        else:
            matrix = matrices[min(int(rng.expovariate(0.3)), len(matrices) - 1)]
            opened.touch(ours, matrix)
            theirs.get((matrix.bank, matrix.row), lambda: torch.empty(16, 64))
        found, expected = ours.stats(), theirs.stats()
        for name in ("hits", "misses", "evictions", "entries", "bytes", "budget"):
            assert getattr(found, name) == getattr(expected, name)
        assert ours.keys() == theirs.keys()
    assert ours.stats().hits > 20 and ours.stats().evictions > 20


def refused(directory):
    """The line with which a directory is refused, if it is."""
    try:
        libglobe.Checkpoint(directory)
    except libglobe.Refused as refusal:
        assert refusal.status == 2 and "\n" not in str(refusal) and str(directory) in str(refusal), str(refusal)
        return str(refusal)
    return None


def test_what_python_refuses_it_refuses(factored):
    """Whatever single value of globe.json is replaced; the reverse holds but for what only this reader looks at."""
    path = factored / "globe.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    read = {key: whole[key] for key in ("format_version", "families", "banks", "source")}
    stricter, compared = set(), 0
    for what, variant in json_variants(read, (None, -1, 1 << 60, 1 << 64, "../x", [], [[]]), most=8):
        if "index_metadata" in what and "removed" not in what:
            continue  # what an export writes of it
        path.write_text(json.dumps(variant), encoding="utf-8")
        try:
            open_factored(factored)
        except GlobeError:
            assert refused(factored) is not None, what
            compared += 1
        else:
            if refused(factored) is not None:
                stricter.add(what.partition(" = ")[0])
    assert compared > 400 and stricter == {"source/layout"}


def test_damaged_headers(factored, plain):
    rng, path = random.Random(3), factored / BANK_FILE
    whole, stopped = path.read_bytes(), 0
    for trial in range(300):
        path.write_bytes(damaged(whole, DAMAGES[trial % len(DAMAGES)], rng))
        try:
            opened = open_factored(factored)
            [opened.bank(name) for name in opened.manifest["banks"]]
        except GlobeError:
            assert refused(factored) is not None
            stopped += 1
    assert stopped > 200
    path.write_bytes(whole)
    assert refused(factored) is None


def test_an_index_that_says_otherwise(factored):
    path = factored / "globe.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    for change in ({name: BANK_FILE}, {"nothing": BANK_FILE}, {name: 3}):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **change}}))
        assert path.name in refused(factored)
    path.write_text(json.dumps({**index, "weight_map": {k: v for k, v in index["weight_map"].items() if k != name}}))
    assert name in refused(factored)


def test_versions_of_the_format(factored):
    path = factored / "globe.json"
    manifest = json.loads(path.read_text())
    old = copy.deepcopy(manifest)
    old["format_version"] = 1
    del old["banks"]
    for family in old["families"].values():
        del family["banks"]
    path.write_text(json.dumps(old))
    assert refused(factored) is None
    for version in (0, 3, 4, True, "2", 2.0):
        path.write_text(json.dumps({**manifest, "format_version": version}))
        assert "reads 1 to 2" in refused(factored)


LATER = {  # the source, settings, and what the refusal says of what was made
    "packed": ("olmoe", {"rank": 32, "left_bits": 4}, "left factors of family gate are packed in integers of 4 bits"),
    "packed atoms": ("olmoe", {"rank": 32, "atom_bits": 8}, "atoms of bank gate are packed in integers of 8 bits"),
    "codes": ("fp8", {"families": ("gate",)}, r"tensor \S+_proj\.weight stays stored as codes"),
    "across": ("llama4", {}, r"tensor \S+_proj is a stack of \[experts, inputs, outputs\]"),
    "in turns": ("inkling2", {}, r"tensor \S+\.experts\.\S+ has rows of gate and up in turns"),
}


@pytest.mark.parametrize("kind", LATER)
def test_later_versions_are_refused_by_what_they_have(kind, tmp_path):
    layout, settings, told = LATER[kind]
    source, out = tmp_path / "source", tmp_path / "out"
    if layout == "fp8":
        codes.fp8_checkpoint(make_tiny("qwen3_moe", source))
    elif layout == "olmoe":
        make_tiny(layout, source)
    else:
        architectures.tiny_model(layout).save_pretrained(source)
    globe.compress(source, out, globe.Settings(**{**SMALL, "rank": 4, **settings}))
    line, version = refused(out), 4 if layout in ("llama4", "inkling2") else 3
    assert re.search(rf": format version {version}, in which {told}; this library reads 1 to 2: run it with", line), (
        line
    )


def test_null_pointers_and_numbers_out_of_range_are_refused(plain):
    opened, out = libglobe.Checkpoint(plain), ctypes.c_void_p()
    matrix = opened.matrix("gate", 0, 0)
    for name, arguments, word in (
        ("open", (None, ctypes.byref(out)), "directory"),
        ("open", (b"/nonexistent", None), "out"),
        ("experts", (None, ctypes.c_int64(0), None), "checkpoint"),
        ("expert_matrix_at", (opened.handle, 3, ctypes.c_int64(0), ctypes.c_int64(0), None), "family"),
        ("bank_at", (opened.handle, ctypes.c_int64(2), None), "bank"),
        ("compose", (opened.handle, ctypes.byref(matrix), None, 1), "out"),
        ("expert_forward", (opened.handle, ctypes.c_int64(0), ctypes.c_int64(0), None, None, None), "options"),
        ("cache_new", (ctypes.c_size_t(0), 7, ctypes.byref(out)), "dtype"),
    ):
        with pytest.raises(libglobe.Refused, match=f"^{word}: found") as caught:
            libglobe.call(name, *arguments)
        assert caught.value.status == 1
    matrix.bank = 7
    with pytest.raises(libglobe.Refused, match="^matrix: found bank 7; expected -1 to 1"):
        libglobe.call("cache_touch", libglobe.Cache(0).handle, opened.handle, ctypes.byref(matrix))
    assert "no globe.json" in refused(Path(os.sep) / "nonexistent")


@pytest.mark.slow
def test_all_experts_of_a_trained_model(tiny_olmoe, tmp_path):
    globe.compress(tiny_olmoe, tmp_path / "out", globe.Settings(**{**SMALL, "rank": 48, "bank_size": 16}))
    globe.export(tmp_path / "out", tmp_path / "dense")
    opened = libglobe.Checkpoint(tmp_path / "out")
    experts = dense_experts(tmp_path / "dense")
    tokens = tokens_of(8, 192)
    assert sorted(experts) == [(layer, e) for layer in opened.layers() for e in range(opened.experts(layer))]
    worst = max(error(opened.forward(place, tokens), expert_of(experts[place], tokens)) for place in experts)
    assert worst < 3 * 2**-8
