"""Warm starts (specification, A to F): a family in, a bank and codes out. One method, one file, one signature."""

from collections.abc import Callable
from dataclasses import dataclass

from globe.seeds.aligned_pca import aligned_pca
from globe.seeds.farthest_first import farthest_first
from globe.seeds.grouped_subspace import grouped_subspace
from globe.seeds.hybrid_replace import hybrid_replace
from globe.seeds.hybrid_split import hybrid_split
from globe.seeds.kmeans import kmeans
from globe.seeds.left_gram import left_gram
from globe.seeds.residual_greedy import residual_greedy
from globe.seeds.rpca import rpca
from globe.seeds.task import Seeds, SeedTask
from globe.seeds.ts_pca import ts_pca
from globe.settings import Settings


@dataclass(frozen=True)
class Method:
    """A seeding method, called with its task.

    Parameters
    ----------
    seed : callable
    passes : callable
        Given the settings, the passes over the family (or its scratch file) that it makes.
    sees_all_rows : bool
        Whether the bank knows the rows held out too; loops from it can then hold none out.
    """

    seed: Callable[[SeedTask], Seeds]
    passes: Callable[[Settings], int]
    sees_all_rows: bool = False

    def __call__(self, task: SeedTask) -> Seeds:
        """Seed a family."""
        return self.seed(task)


def _on_one_gram(settings: Settings) -> int:
    return 2 if settings.proxies == "rows" else 4


METHODS: dict[str, Method] = {
    "ts-pca": Method(ts_pca, lambda settings: 2),
    "left-gram": Method(left_gram, lambda settings: 4),
    "rpca": Method(rpca, lambda settings: 4 + 2 * settings.power_iterations),
    "kmeans": Method(kmeans, _on_one_gram),
    "farthest-first": Method(farthest_first, _on_one_gram),
    "residual-greedy": Method(residual_greedy, _on_one_gram),
    "hybrid-split": Method(hybrid_split, _on_one_gram),
    "hybrid-replace": Method(hybrid_replace, _on_one_gram),
    "aligned-pca": Method(aligned_pca, lambda settings: 3 + settings.procrustes_rounds),
    "grouped-subspace": Method(grouped_subspace, lambda settings: 2, sees_all_rows=True),
}

__all__ = [
    "METHODS",
    "Method",
    "SeedTask",
    "Seeds",
    "aligned_pca",
    "farthest_first",
    "grouped_subspace",
    "hybrid_replace",
    "hybrid_split",
    "kmeans",
    "left_gram",
    "residual_greedy",
    "rpca",
    "ts_pca",
]
