"""What a stage takes in hand at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """What a stage takes in hand at a time.

    Parameters
    ----------
    experts : int
        Experts of a pass that share one reading of the bank.
    proxy_bytes : int
        Bytes of one block of proxies.
    columns : int
        Columns of the bank in the exact dictionary step.
    pairs : int
        Pairs of differences that the joint fit keeps.
    cached : int
        Bytes of experts, as its metric sees them, that the joint fit keeps in memory: all of a pool's or none.
    """

    experts: int = 32
    proxy_bytes: int = 256 << 20
    columns: int = 512
    pairs: int = 10
    cached: int = 1 << 40


BLOCKS = Blocks()
SMALLEST = Blocks(1, 1 << 20, 16, 1, 0)
