"""What the report shows of a finished output: metrics.json, globe.json and the codes of the banks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from globe.artifact.factored import BANK_FILE, Factored, bank_name, open_factored
from globe.checkpoint.json_file import read_json
from globe.checkpoint.tensorfile import read_tensor
from globe.errors import GlobeError
from globe.evaluation.perplexity import Evaluation
from globe.evaluation.record import read_record

Array = NDArray[np.float64]
_METRICS = "metrics.json"


@dataclass(frozen=True)
class FamilyView:
    """A family's experts in order of layer and number, with the relative error of each.

    `weighted` is that in the metric of the activations, where there was one.
    """

    name: str
    p: int
    d: int
    rank: int
    atoms: int
    layers: NDArray[np.int64]
    numbers: NDArray[np.int64]
    errors: Array
    weighted: Array | None
    report: dict[str, Any]

    def by_layer(self, errors: Array) -> tuple[list[int], list[float], list[float]]:
        """The layers, and the mean and the largest error of the experts of each."""
        held = [(int(layer), errors[self.layers == layer]) for layer in np.unique(self.layers)]
        return [one for one, _ in held], [float(e.mean()) for _, e in held], [float(e.max()) for _, e in held]

    def grid(self, errors: Array) -> tuple[Array, list[int]]:
        """Errors as experts × layers, NaN where a layer has fewer experts; and the layers."""
        layers = np.unique(self.layers)
        found = np.full((int(self.numbers.max()) + 1, len(layers)), np.nan)
        found[self.numbers, np.searchsorted(layers, self.layers)] = errors
        return found, layers.tolist()


@dataclass(frozen=True)
class PoolView:
    """The experts that share a bank.

    `users` (m, L) counts the experts of every layer that use an atom, `weight` (m, L) is the atom's mean share of their
    codes' absolute sum: the columns of `weight` have sum one. `held` (L,) counts the experts of every layer.
    """

    name: str
    rank: int
    atoms: int
    layers: list[int]
    held: NDArray[np.int64]
    users: NDArray[np.int64]
    weight: Array
    report: dict[str, Any]

    def order(self) -> NDArray[np.int64]:
        """The atoms from those of the first layers to those of the last, by mean layer; those without use last."""
        total = self.weight.sum(1)
        mean = (self.weight @ np.arange(len(self.layers))) / np.where(total > 0, total, 1.0)
        return np.argsort(np.where(total > 0, mean, np.inf), kind="stable")

    def alike(self) -> Array:
        """Layers × layers: the part of two layers' weight that lies on the same atoms, Σ_j min(w_j, w'_j)."""
        columns = self.weight.T
        return np.stack([np.minimum(column, columns).sum(1) for column in columns])


@dataclass(frozen=True)
class Run:
    """A finished output as the report sees it; `judged` is what its evaluation.json has of its weights."""

    name: str
    metrics: dict[str, Any]
    families: list[FamilyView]
    pools: list[PoolView]
    judged: tuple[Evaluation, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that it was made with."""
        found: dict[str, Any] = self.metrics["settings"]
        return found


def read_run(directory: Path) -> Run:
    """Read what a finished output says of itself; no weights but the codes.

    Raises
    ------
    GlobeError
        If it is no finished output, or metrics.json does not go with it.
    """
    factored = open_factored(directory)
    metrics = read_json(directory / _METRICS)
    try:
        experts = {name: _experts(family) for name, family in factored.manifest["families"].items()}
        families = [_family(factored, metrics, name, held) for name, held in experts.items()]
        pools = [_pool(factored, metrics, name, experts) for name in factored.manifest["banks"]]
        for key in ("ratio", "bytes", "settings", "source", "stages"):
            metrics[key]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise GlobeError(f"{directory / _METRICS}: does not go with globe.json ({what}); compress again") from None
    return Run(directory.resolve().name, metrics, families, pools, tuple(read_record(directory)))


def _experts(family: dict[str, Any]) -> list[tuple[int, int, str]]:
    """Layer, number in the bank, and bank of every expert, in order; all layouts name the layer first."""
    found = []
    for tensor, numbers in family["tensors"].items():
        layer = re.search(r"\d+", tensor)
        if layer is None:
            raise ValueError(f"tensor {tensor} names no layer")
        found += [(int(layer[0]), number, family["banks"][tensor]) for number in numbers]
    return sorted(found)


def _family(factored: Factored, metrics: dict[str, Any], name: str, held: list[tuple[int, int, str]]) -> FamilyView:
    described, report = factored.manifest["families"][name], metrics["families"][name]
    errors, seen = np.asarray(report["expert_errors"], dtype=float), report.get("expert_weighted_errors")
    weighted = np.asarray(seen, dtype=float) if seen is not None else None
    if errors.shape != (len(held),) or (weighted is not None and weighted.shape != errors.shape):
        raise ValueError(f"family {name} has errors of {errors.size} experts, not of {len(held)}")
    layers = np.array([layer for layer, _, _ in held])
    numbers = np.concatenate([np.arange(count) for count in np.unique(layers, return_counts=True)[1]])
    p, d, rank, atoms = (described[key] for key in ("p", "d", "rank", "bank"))
    return FamilyView(name, p, d, rank, atoms, layers, numbers, errors, weighted, report)


def _pool(
    factored: Factored, metrics: dict[str, Any], name: str, experts: dict[str, list[tuple[int, int, str]]]
) -> PoolView:
    described = factored.manifest["banks"][name]
    report = metrics.get("pools", metrics["families"])[name]
    codes = abs(_codes(factored, name, described["experts"], described["bank"]))
    layer_of = np.zeros(described["experts"], dtype=int)
    for held in experts.values():
        for layer, number, bank in held:
            if bank == name:
                layer_of[number] = layer
    layers, places = np.unique(layer_of, return_inverse=True)
    member = scipy.sparse.csr_array((np.ones(len(places)), (places, np.arange(len(places)))))
    count = np.bincount(places)
    total = codes.sum(1)
    shares = scipy.sparse.diags_array(1 / np.where(total > 0, total, 1.0)) @ codes
    weight = ((member @ shares).toarray() / count[:, None]).T
    users = (member @ (codes > 0).astype(float)).toarray().T.round().astype(int)
    return PoolView(name, described["rank"], described["bank"], layers.tolist(), count, users, weight, report)


def _codes(factored: Factored, name: str, experts: int, atoms: int) -> scipy.sparse.csr_array:
    """The codes alone: the atoms may be large, and nothing here looks at them."""
    tensors = factored.shards[BANK_FILE].tensors
    parts = (read_tensor(tensors[bank_name(name, f"codes.{part}")]) for part in ("values", "indices", "indptr"))
    values, indices, indptr = (part.numpy() for part in parts)
    found = scipy.sparse.csr_array((values.astype(float), indices, indptr), shape=(experts, atoms))
    found.check_format()
    return found
