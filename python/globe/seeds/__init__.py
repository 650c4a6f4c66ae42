"""Warm starts (specification, A to F): a family in, a bank and codes out. One method, one file, one signature."""

from collections.abc import Callable

from globe.seeds.grouped_subspace import grouped_subspace
from globe.seeds.task import Seeds, SeedTask
from globe.seeds.ts_pca import ts_pca

METHODS: dict[str, Callable[[SeedTask], Seeds]] = {"ts-pca": ts_pca, "grouped-subspace": grouped_subspace}

__all__ = ["METHODS", "SeedTask", "Seeds", "grouped_subspace", "ts_pca"]
