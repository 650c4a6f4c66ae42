"""Settings: YAML there and back, every bound, and the resolved rank and bank size."""

from __future__ import annotations

import dataclasses
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from globe.errors import UsageError
from globe.settings import Settings, parse_bytes, parse_seconds, seconds_text
from globe.settings.yaml_file import read_settings

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"
NAMES = [field.name for field in dataclasses.fields(Settings)]
FLOATS = {
    "bank_ratio": (0.0, 1.0),
    "temperature": (1e-3, 1e3),
    "temperature_rate": (0.0, 10.0),
    "epsilon": (0.0, 0.5),
    "l1": (0.0, 1.0),
    "greedy_l1": (0.0, 1.0),
    "hybrid_share": (0.0, 1.0),
    "seed_budget": (1.0, 1e6),
    "mod_ridge": (0.0, 1.0),
    "over_relaxation": (0.0, 1.0),
    "ridge": (0.0, 1.0),
    "ridge_rcond": (0.0, 1.0),
    "validation_share": (0.0, 0.5),
    "tolerance": (0.0, 1.0),
    "support_tolerance": (0.0, 1000.0),
    "metric_rows": (0.0, 2.0),
    "metric_layers": (0.0, 2.0),
    "coherence": (0.0, 1e6),
    "duplicate": (0.0, 1.0),
    "metric_shrinkage": (0.0, 1e12),
}
COUNTS = {
    "bank_size": 1,
    "energy_experts": 1,
    "outer_loops": 0,
    "support": 1,
    "subspace_steps": 1,
    "temperature_every": 1,
    "cg_steps": 1,
    "oversampling": 0,
    "power_iterations": 0,
    "lloyd_steps": 0,
    "procrustes_rounds": 1,
    "patience": 1,
    "max_memory": 1 << 20,
    "seed": 0,
    "threads": 1,
    "joint_steps": 1,
    "calibration_tokens": 64,
}
CHOICES = {
    "proxies": ["rows", "projected"],
    "greedy_codes": ["nnls", "lasso"],
    "hybrid_centres": ["kmeans", "farthest-first"],
    "method": [
        "ts-pca",
        "left-gram",
        "rpca",
        "kmeans",
        "farthest-first",
        "residual-greedy",
        "hybrid-split",
        "hybrid-replace",
        "aligned-pca",
        "grouped-subspace",
        "auto",
    ],
    "selector": ["energy", "uniform", "random"],
    "solver": ["joint", "alternate"],
    "mod": ["exact", "aligned", "fixed"],
    "init_codes": ["nnls", "simplex"],
    "codes": ["entmax", "sparsemax", "nnls", "simplex", "signed"],
    "device": ["auto", "cpu", "mps", "cuda"],
    "precision": ["auto", "fp32"],
    "metric": ["fisher", "residual"],
}
BITS = {"factor_bits": [16, 8, 4, 3], "left_bits": [None, 16, 8, 4, 3], "atom_bits": [None, 16, 8, 4, 3]}


@st.composite
def any_settings(draw: st.DrawFn) -> dict[str, Any]:
    keys: dict[str, st.SearchStrategy[Any]] = {
        "rank": st.one_of(st.integers(1, 4096), st.floats(0, 1, exclude_min=True)),
        "scope": st.one_of(st.sampled_from(["global", "layer"]), st.integers(1, 1000)),
        "share_families": st.booleans(),
        "families": st.sampled_from([("gate",), ("up",), ("gate", "up"), ("up", "gate"), ("down", "up")]),
        "entmax_alpha": st.floats(1, 2, exclude_min=True),
        "time_limit": st.floats(1, 1e9),
        "calibrate": st.sampled_from(["auto", "self", "pydoc", "none", "folder/calibration.safetensors"]),
        **{name: st.floats(*bounds) for name, bounds in FLOATS.items()},
        **{name: st.integers(least, least + 900) for name, least in COUNTS.items()},
        **{name: st.sampled_from(values) for name, values in {**CHOICES, **BITS}.items()},
        "group_size": st.integers(32, 128),
    }
    values = draw(st.fixed_dictionaries({}, optional=keys))
    if values.get("bank_size") is not None:
        values.pop("bank_ratio", None)
    if values.get("l1"):
        values["codes"] = "nnls"
    return values


def test_every_setting_is_covered_here() -> None:
    others = {
        "rank",
        "ratio",
        "families",
        "scope",
        "share_families",
        "entmax_alpha",
        "calibrate",
        "time_limit",
        "correct",
        "group_size",
    }
    assert {*FLOATS, *COUNTS, *CHOICES, *BITS} | others == set(NAMES)


@given(values=any_settings())
def test_yaml_round_trip(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = Settings(**values)
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    path.write_text(yaml.safe_dump(settings.as_dict()), encoding="utf-8")
    assert read_settings(path, {}) == settings


@pytest.mark.parametrize(("name", "bounds"), FLOATS.items())
def test_bounds_of_fractions(name: str, bounds: tuple[float, float]) -> None:
    extra = {"codes": "nnls"} if name == "l1" else {}
    for value in bounds:
        assert getattr(Settings(**{name: value}, **extra), name) == value
    highest = 1 << 20 if name == "support_tolerance" else bounds[1]
    outside = (math.nextafter(bounds[0], -1), math.nextafter(highest, math.inf))
    for bad in (*outside, math.nan, math.inf, -math.inf, "1", True):
        with pytest.raises(UsageError, match=f"^{name} is "):
            Settings(**{name: bad}, **extra)


@pytest.mark.parametrize(("name", "least"), COUNTS.items())
def test_bounds_of_counts(name: str, least: int) -> None:
    assert getattr(Settings(**{name: least}), name) == least
    for bad in (least - 1, 1 << 70, float(least + 1), math.inf, "3", False):
        with pytest.raises(UsageError, match=f"^{name} is "):
            Settings(**{name: bad})


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
def test_choices(name: str, choices: list[str]) -> None:
    for choice in choices:
        assert getattr(Settings(**{name: choice}), name) == choice
    for bad in ("other", "", None, 1, [choices[0]]):
        with pytest.raises(UsageError, match=f"^{name} is .*expected one of {', '.join(choices)}$"):
            Settings(**{name: bad})


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("bad", [2, 5, 32, 0, -4, 4.0, "4", True, math.nan])
def test_bits(name: str, bad: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is .*; expected 16, 8, 4 or 3$"):
        Settings(**{name: bad})


@pytest.mark.parametrize("size", [0, 31, 129, 32.0, None, "64"])
def test_group_size(size: Any) -> None:
    with pytest.raises(UsageError, match="^group_size is "):
        Settings(group_size=size)


def test_stored_bits() -> None:
    assert Settings().stored_bits == (16, 16)
    assert Settings(factor_bits=4).stored_bits == (4, 4)
    assert Settings(factor_bits=4, atom_bits=8).stored_bits == (4, 8)
    assert Settings(left_bits=3).stored_bits == (3, 16)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.0001, math.nan])
def test_entmax_alpha(alpha: float) -> None:
    with pytest.raises(UsageError, match="^entmax_alpha is "):
        Settings(entmax_alpha=alpha)


@pytest.mark.parametrize("scope", [0, -1, True, "4", "all", 1.0, None])
def test_scope(scope: Any) -> None:
    with pytest.raises(UsageError, match="^scope is .*; expected global, layer or a count of layers"):
        Settings(scope=scope)


@pytest.mark.parametrize("correct", ["up", "", None, True])
def test_corrections_are_named(correct: object) -> None:
    with pytest.raises(UsageError, match="correct is .*; expected one of none, down"):
        Settings(correct=correct)  # type: ignore[arg-type]


@pytest.mark.parametrize("calibrate", [None, "", 1, True, ["auto"]])
def test_calibrate(calibrate: Any) -> None:
    with pytest.raises(UsageError, match="^calibrate is .*; expected auto, self, pydoc, none or a file of globe"):
        Settings(calibrate=calibrate)


@pytest.mark.parametrize("share", [1, "true", None])
def test_share_families(share: Any) -> None:
    with pytest.raises(UsageError, match="^share_families is .*; expected true or false"):
        Settings(share_families=share)


@pytest.mark.parametrize("families", [(), ("router",), ("gate", "gate"), "gate", (1,)])
def test_families(families: Any) -> None:
    with pytest.raises(UsageError, match="^families is "):
        Settings(families=families)


@pytest.mark.parametrize("codes", ["entmax", "sparsemax", "simplex"])
def test_l1_needs_nnls_codes(codes: str) -> None:
    with pytest.raises(UsageError, match="on the simplex the L1 norm is constant; use codes nnls"):
        Settings(codes=codes, l1=0.1)  # type: ignore[arg-type]


def test_one_bank_size_only() -> None:
    with pytest.raises(UsageError, match="bank_ratio and bank_size are both given"):
        Settings(bank_ratio=0.5, bank_size=3)


@pytest.mark.parametrize(
    ("rank", "found"), [(0.75, 30), (1.0, 40), (1, 1), (40, 40), (40.0, 40), (0.0126, 1), (0.99, 40), (2.0, 2)]
)
def test_resolved_rank(rank: float, found: int) -> None:
    assert Settings(rank=rank).resolve_rank(64, 40) == Settings(rank=rank).resolve_rank(40, 64) == found


@pytest.mark.parametrize("rank", [0, 0.0, -1, -0.5, 41, 41.0, 1.5, 0.001, math.nan, math.inf, True, "1", None])
def test_refused_rank(rank: Any) -> None:
    with pytest.raises(UsageError, match="^rank is "):
        Settings(rank=rank).resolve_rank(64, 40)


@pytest.mark.parametrize(
    ("given_as", "experts", "found"),
    [
        ({}, 2, 1), ({}, 16, 4), ({}, 255, 63), ({}, 256, 64), ({}, 511, 64), ({}, 512, 128), ({}, 5760, 128),
        ({"bank_ratio": 0.125}, 120, 15), ({"bank_ratio": 1.0}, 7, 7), ({"bank_ratio": 0.001}, 7, 1),
        ({"bank_size": 30}, 120, 30), ({"bank_size": 120}, 120, 120),
    ],
)  # fmt: skip
def test_resolved_bank(given_as: dict[str, Any], experts: int, found: int) -> None:
    assert Settings(**given_as).resolve_bank(experts) == found


def test_refused_bank() -> None:
    with pytest.raises(UsageError, match="bank size is 121; expected 1 to the family's 120 experts"):
        Settings(bank_size=121).resolve_bank(120)


@pytest.mark.parametrize(
    ("text", "found"),
    [("6GiB", 6 << 30), ("500 MB", 500_000_000), ("2G", 2 << 30), ("1.5KiB", 1536), ("8388608", 8 << 20)],
)
def test_sizes_as_people_write_them(text: str, found: int) -> None:
    assert parse_bytes(text) == found


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "6 gigs", "1e9"])
def test_refused_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="expected bytes or a size such as 6GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90s", 90), ("40m", 2400), ("2h", 7200), ("1h30m", 5400), ("1h 30m 5s", 5405), ("0.5h", 1800), ("90", 90),
        ("2 min", 120), ("1.5m", 90),
    ],
)  # fmt: skip
def test_times_as_people_write_them(text: str, found: float, tmp_path: Path) -> None:
    assert parse_seconds(text) == found
    assert Settings(time_limit=text).time_limit == found  # type: ignore[arg-type]
    assert read(tmp_path, f"time_limit: {text}\n").time_limit == found
    assert read_settings(None, {"time_limit": text}) == Settings(time_limit=found)


@pytest.mark.parametrize("text", ["", "h", "2 days", "-1h", "30m1h", "1e3", "inf", "1:30", "m"])
def test_refused_times(text: str) -> None:
    with pytest.raises(UsageError, match=f"^time_limit is {text!r}; expected seconds or a time such as 90s, 40m"):
        parse_seconds(text)


@pytest.mark.parametrize("bad", [0, 0.5, -1, 2e9, math.nan, math.inf, True, "0s", [1]])
def test_refused_time_limits(bad: Any) -> None:
    with pytest.raises(UsageError, match="^time_limit is "):
        Settings(time_limit=bad)
    assert Settings(time_limit=1).time_limit == 1 and Settings().time_limit is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.25, "1.2 s"), (52, "52 s"), (90, "2 min"), (3120, "52 min"), (3599, "1 h 0 min"), (6720, "1 h 52 min")],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def read(tmp_path: Path, text: str, **overrides: Any) -> Settings:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path, overrides)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", "1.e-4", "100e-6"])
def test_numbers_as_people_write_them(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"mod_ridge: {text}\n").mod_ridge == 1e-4


def test_options_win_over_the_file(tmp_path: Path) -> None:
    text = "rank: 12\nbank_ratio: 0.5\nfamilies: up\ncodes: sparsemax\n"
    assert read(tmp_path, text) == Settings(rank=12, bank_ratio=0.5, families=("up",), codes="sparsemax")
    assert read(tmp_path, text, bank_size=3, rank=0.5).as_dict() == {
        **Settings(families=("up",), codes="sparsemax", bank_size=3, rank=0.5).as_dict(),
    }
    assert read(tmp_path, "bank_size: 3\n", bank_ratio=0.5) == Settings(bank_ratio=0.5)
    assert read(tmp_path, "", families="up,gate") == Settings(families=("up", "gate"))
    assert read_settings(None, {}) == read(tmp_path, "") == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranks: 3\n", "config key 'ranks' is not a setting"),
        ("- rank\n", "expected keys and values, found list"),
        ("rank: [\n", "cannot be read as YAML"),
        ("rank: '0.5'\n", "rank is '0.5'; expected a number"),
        ("families: 3\n", "families is 3; expected any of gate, up and down"),
        ("3: 4\n", "config key 3 is not a setting"),
    ],
)
def test_refused_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        read(tmp_path, text)
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        read_settings(tmp_path / "absent.yaml", {})


def test_the_page_of_settings_is_not_stale() -> None:
    page = runpy.run_path(str(DOCS.with_suffix(".py")))["settings_page"]()
    assert DOCS.read_text(encoding="utf-8") == page, "stale; run: python docs/settings.py"


def test_every_setting_is_documented_with_its_default() -> None:
    lines = re.findall(r"^\| `(\w+)` \| [^|]+ \| `(.*?)` \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _, _ in lines] == NAMES
    in_docstring = " ".join((Settings.__doc__ or "").split())
    for name, default, meaning in lines:
        value = getattr(Settings(), name)
        shown = "not given" if value is None else ",".join(value) if name == "families" else str(value)
        assert default == shown, name
        assert meaning in in_docstring, name


@pytest.mark.parametrize(
    ("text", "overrides", "found"),
    [
        ("ratio: 0.7\n", {}, Settings(ratio=0.7)),
        ("rank: 12\nbank_size: 3\n", {"ratio": 0.7}, Settings(ratio=0.7)),
        ("ratio: 0.7\n", {"rank": 12}, Settings(rank=12)),
        ("ratio: 0.7\n", {"bank_ratio": 0.1}, Settings(bank_ratio=0.1)),
        (yaml.safe_dump(Settings(ratio=0.7).as_dict()), {"seed": 3}, Settings(ratio=0.7, seed=3)),
        (yaml.safe_dump(Settings(ratio=0.7).as_dict()), {"bank_size": 5}, Settings(bank_size=5)),
    ],
)
def test_a_ratio_takes_the_place_of_sizes(
    text: str, overrides: dict[str, Any], found: Settings, tmp_path: Path
) -> None:
    assert read(tmp_path, text, **overrides) == found


@pytest.mark.parametrize("given", [{"rank": 0.5}, {"bank_size": 3}, {"bank_ratio": 0.1}])
def test_a_ratio_beside_sizes(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^ratio and {next(iter(given))} are both given"):
        Settings(ratio=0.7, **given)
    with pytest.raises(UsageError, match=f"^ratio and {next(iter(given))} are both given"):
        read(tmp_path, "", ratio=0.7, **given)
