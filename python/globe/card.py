"""The model card of a factored checkpoint."""

from __future__ import annotations

from typing import Any

import yaml


def _sharing(settings: dict[str, Any]) -> str:
    several = settings.get("share_families") and len(settings["families"]) > 1
    scope = settings.get("scope", "global")
    layers = {"global": "all layers", "layer": "a layer"}.get(scope, f"{scope} consecutive layers")
    return f"{layers} and families" if several else f"{layers}, for each family"


def model_card(model: str, metrics: dict[str, Any]) -> str:
    """README.md of a factored directory: what it is, how it was made, how well it fits."""
    front = yaml.safe_dump({"base_model": model, "library_name": "globe-moe", "tags": ["globe", "compressed"]})
    rows = "\n".join(
        f"| {name} | {family['rank']} | {family['bank']} | {family['relative_error']:.4f} | "
        f"{family['support_median']:g} |"
        for name, family in metrics["families"].items()
    )
    ratio = metrics["ratio"]
    settings = yaml.safe_dump(metrics["settings"], sort_keys=True)
    return f"""---
{front}---

# {model}, experts factored by GloBE

Every routed expert matrix W_i is stored as A_i · Σ_j α_ij B_j: its own left factor A_i, sparse non-negative
codes α_i, and a bank of atoms B_j shared by all experts of {_sharing(metrics["settings"])}.

| family | rank | atoms | relative error | median support |
| --- | --- | --- | --- | --- |
{rows}

Stored weights over dense: {ratio["touched"]:.3f} of the touched matrices, {ratio["experts"]:.3f} of all expert
weights, {ratio["checkpoint"]:.3f} of the checkpoint.

`pip install "globe-moe[hf]"`, then in Python:

```python
import globe

model = globe.load("DIRECTORY", cache="2GiB")
```

`globe export DIRECTORY DENSE` gives the dense checkpoint that any engine loads.

Settings (`globe compress MODEL OUT --config settings.yaml`):

```yaml
{settings}```
"""
