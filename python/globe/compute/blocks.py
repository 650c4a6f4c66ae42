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
    cached : int
        Bytes of what the joint fit keeps of single experts that may lie in memory: the rest goes to scratch files.
    """

    experts: int = 32
    proxy_bytes: int = 256 << 20
    columns: int = 512
    cached: int = 1 << 40


BLOCKS = Blocks()
SMALLEST = Blocks(1, 1 << 20, 16, 0)
