"""evaluation.json: what a factored directory was judged on against its original, and the warning that follows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from globe._version import __version__
from globe.checkpoint.companions import EVALUATION
from globe.checkpoint.json_file import read_json
from globe.checkpoint.tensorfile import write_text
from globe.errors import GlobeError
from globe.evaluation.perplexity import Evaluation, geometric_mean

WORSE = 4 / 3  # times the best ratio of a kind calibrated on

_FLOATS = ("perplexity", "reference_perplexity", "kl")


def warning(found: Sequence[Evaluation]) -> str | None:
    """Whether a model is good on what its calibration has seen and not on other text, in plain words.

    It is where on some text the perplexity, over the original's, is `WORSE` or more times what it is on the best of the
    kinds that were calibrated on: there the loss of a token has grown by ln 4/3, 0.29 nats, more. Their held-out halves
    count among the texts.
    """
    seen = [each for each in found if each.calibrated]
    if not seen:
        return None
    best, worst = min(seen, key=lambda each: each.ratio), max(found, key=lambda each: each.ratio)
    if not worst.ratio >= WORSE * best.ratio:
        return None
    return (
        f"Good on what it has seen, not on other text: perplexity is {worst.ratio:.2f} times the original's on "
        f"{worst.text}, {best.ratio:.2f} times on {best.text}. Calibrate on text of that kind too."
    )


def add_to_record(out: Path, found: Sequence[Evaluation]) -> list[Evaluation]:
    """Write evaluations against the original to evaluation.json; all that it then holds.

    Those of other texts stay if they are of the weights that are there now.

    Raises
    ------
    GlobeError
        If the file cannot be written, or metrics.json does not tell the weights.
    """
    now = {each.text: each for each in found}
    rows = [now.pop(each.text, each) for each in read_record(out)]
    rows += now.values()
    told = {
        "globe_version": __version__,
        "weights": _weights(out),
        "texts": [_plain(each) for each in rows],
        "geometric_mean": _finite(geometric_mean(rows)),
        "warning": warning(rows),
    }
    try:
        write_text(out / EVALUATION, json.dumps(told, indent=1) + "\n")
    except OSError as error:
        raise GlobeError(f"{out / EVALUATION}: cannot be written ({error.strerror})") from None
    return rows


def read_record(out: Path) -> list[Evaluation]:
    """The evaluations of evaluation.json; none where there are none of the weights that are there now.

    Raises
    ------
    GlobeError
        If the file is damaged.
    """
    path = out / EVALUATION
    if not path.exists():
        return []
    told = read_json(path)
    if told.get("weights") != _weights(out):
        return []
    try:
        return [_evaluation(row) for row in told["texts"]]
    except (KeyError, TypeError, AttributeError):
        raise GlobeError(f"{path}: damaged; remove it and run globe eval again") from None


def _weights(out: Path) -> dict[str, str]:
    """The SHA-256 of every weight file, as metrics.json states them."""
    try:
        return {name: file["sha256"] for name, file in read_json(out / "metrics.json")["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise GlobeError(f"{out / 'metrics.json'}: does not state its files; compress again") from None


def _plain(each: Evaluation) -> dict[str, Any]:
    row = {**asdict(each), "ratio": each.ratio}
    return {key: _finite(value) if isinstance(value, float) else value for key, value in row.items()}


def _evaluation(row: dict[str, Any]) -> Evaluation:
    infinite = {key: math.inf for key in _FLOATS if row[key] is None}
    return Evaluation(**{key: value for key, value in {**row, **infinite}.items() if key != "ratio"})


def _finite(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None
