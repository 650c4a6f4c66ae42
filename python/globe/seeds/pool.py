"""The experts that share a bank, and what every stage of their fit needs of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from globe.checkpoint.family import Family
from globe.seeds.proxies import Rows, Scan, split_rows
from globe.settings import Settings
from globe.sizes.ratios import Shape
from globe.statistics.metric import Metric


@dataclass(frozen=True)
class Pool:
    """Experts that share a bank.

    Parameters
    ----------
    family : Family
        Their matrices W_i (p × d).
    shape : Shape
        What is stored of them.
    rows : Rows
        Which rows train, which are held out, and which make proxies.
    metric : Metric, optional
        How errors are weighed; None weighs all alike.
    """

    family: Family
    shape: Shape
    rows: Rows
    metric: Metric | None = None

    @property
    def name(self) -> str:
        """The family's, or that of its group of layers."""
        return self.family.name

    def all_trained(self) -> Pool:
        """The same with no row held out."""
        return replace(self, rows=self.rows.all_trained())


def pool_of(family: Family, shape: Shape, scan: Scan, settings: Settings, metric: Metric | None = None) -> Pool:
    """A family whose rows are split as its scan and the settings say."""
    return Pool(family, shape, split_rows(family.p, shape.rank, scan.row_energy, settings), metric)
