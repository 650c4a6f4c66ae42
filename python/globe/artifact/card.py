"""The model card of a factored checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from globe.checkpoint.companions import SETTINGS_FILE

JUDGED = "Judged on text"  # the heading of what `globe eval` found

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OF_THE_SOURCE = ("license", "license_name", "license_link", "language", "pipeline_tag")


def _sharing(settings: dict[str, Any]) -> str:
    several = settings.get("share_families") and len(settings["families"]) > 1
    scope = settings.get("scope", "global")
    layers = {"global": "all layers", "layer": "a layer"}.get(scope, f"{scope} consecutive layers")
    return f"{layers} and families" if several else f"{layers}, for each family"


def base_model(source: Path, config: dict[str, Any]) -> str:
    """The hub's name of a checkpoint, as far as its files tell; else that of its directory."""
    for part in source.resolve().parts:
        if part.startswith("models--"):  # the hub's cache
            return part.removeprefix("models--").replace("--", "/")
    told = config.get("_name_or_path")
    if isinstance(told, str) and "/" in told and _HUB_NAME.fullmatch(told):
        return told
    return source.resolve().name


def settings_file(metrics: dict[str, Any]) -> str:
    """The settings of a run as YAML, for `globe compress --config`; what else its last bits depend on is a comment."""
    threads = f"{metrics['threads']} thread{'s' if metrics['threads'] != 1 else ''}"
    return (
        f"# GloBE {metrics['globe_version']}, source {metrics['source']['fingerprint']}\n"
        f"# run on {metrics['device']} with {threads}: the weight files are the same to the bit on such a machine\n"
        + yaml.safe_dump(metrics["settings"], sort_keys=False)
    )


def model_card(source: Path, config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """README.md of a factored directory: what it is, how it was made, how well it fits."""
    model = base_model(source, config)
    front = {
        "base_model": model,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["globe", "compressed", "mixture-of-experts"],
        "pipeline_tag": "text-generation",
        **_front_matter(source),
        "model-index": [{"name": f"{model}, experts factored by GloBE", "results": [_results(model, metrics)]}],
    }
    rows = "\n".join(
        f"| {name} | {family['rank']} | {family['bank']} | {family['relative_error']:.4f} | "
        f"{_number(family.get('weighted_error'))} | {family['support_median']:g} |"
        for name, family in metrics["families"].items()
    )
    ratio = metrics["ratio"]
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {model}, experts factored by GloBE

Every routed expert matrix W_i is stored as A_i · Σ_j α_ij B_j: its own left factor A_i, sparse non-negative
codes α_i, and a bank of atoms B_j shared by all experts of {_sharing(metrics["settings"])}.

| family | rank | atoms | relative error | weighted error | median support |
| --- | --- | --- | --- | --- | --- |
{rows}

Errors are Σ‖W − Ŵ‖² / Σ‖W‖²; the weighted one counts a direction by the activations of a calibration text.
Stored weights over dense: {ratio["touched"]:.3f} of the touched matrices, {ratio["experts"]:.3f} of all expert
weights, {ratio["checkpoint"]:.3f} of the checkpoint.{_bits(metrics.get("bits"))}
{_calibrated_on(metrics.get("calibration"))}
`pip install "globe-moe[hf]"`, then in Python:

```python
import globe

model = globe.load("DIRECTORY", cache="2GiB")
```

`globe export DIRECTORY DENSE` gives the dense checkpoint that any engine loads.

Made by GloBE {metrics["globe_version"]}, from a directory MODEL that holds {model}:

```sh
globe compress MODEL OUT --config {SETTINGS_FILE}
```
"""


def _bits(bits: dict[str, int] | None) -> str:
    """What factors are stored in, where that is not bf16 alone."""
    told = bits_text(bits)
    return f" {told[0].upper()}{told[1:]}." if told else ""


def bits_text(bits: dict[str, int] | None) -> str:
    """The bits in which factors are stored, from metrics.json, in words; nothing where all are bf16."""
    if bits is None or (bits["lefts"], bits["atoms"]) == (16, 16):
        return ""
    shared = f"groups of {bits['group']} share a scale"
    return f"left factors are stored in {bits['lefts']} bits, atoms in {bits['atoms']} ({shared})"


def with_section(card: str, title: str, body: str | None) -> str:
    """A card with a section of this heading, in place of the one that it has, or at its end; None takes it away."""
    section = "" if body is None else f"## {title}\n\n{body.strip()}\n"
    before, heading, after = card.partition(f"\n## {title}\n")
    if not heading:
        return card if not section else f"{card.rstrip()}\n\n{section}"
    rest = after.find("\n## ")
    return "\n".join(part for part in (before, section, after[rest + 1 :] if rest >= 0 else "") if part)


def _calibrated_on(calibration: dict[str, Any] | None) -> str:
    """The table of texts; nothing where weights alone were fitted."""
    if calibration is None or not calibration.get("texts"):
        return ""
    lines = ["", "| calibrated on | tokens | share |", "| --- | --- | --- |"]
    for text in calibration["texts"]:
        name = "samples of the model itself" if text["name"] == "self" else text["name"].replace("|", "\\|")
        lines.append(f"| {name} | {text['tokens']:,} | {text['share']:.1%} |")
    return "\n".join([*lines, ""])


def _results(model: str, metrics: dict[str, Any]) -> dict[str, Any]:
    figures = [
        {"type": kind, "value": round(family[kind], 6), "name": f"{kind.replace('_', ' ')}, {name}"}
        for name, family in metrics["families"].items()
        for kind in ("relative_error", "weighted_error")
        if family.get(kind) is not None
    ]
    shares = [
        {"type": "stored_over_dense", "value": round(share, 6), "name": f"stored over dense, {axis}"}
        for axis, share in metrics["ratio"].items()
    ]
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": "weights", "name": f"the routed experts of {model}"},
        "metrics": figures + shares,
    }


def _front_matter(source: Path) -> dict[str, Any]:
    """What a model card of the source states that holds for its factors too."""
    card = source / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
        parts = text.split("---\n", 2)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in _OF_THE_SOURCE if key in found} if isinstance(found, dict) else {}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
