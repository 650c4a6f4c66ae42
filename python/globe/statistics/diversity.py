"""Windows of a text chosen for the variety of their words."""

from __future__ import annotations

import heapq

import numpy as np
import torch


def most_diverse(windows: torch.Tensor, count: int) -> torch.Tensor:
    """Which windows together cover the most of the vocabulary, chosen one by one (ZipCal, arXiv 2603.16105).

    Each choice is the window with the most kinds of token that none before it has; the first of equals. Once no window
    adds any, covering begins anew. A gain only shrinks while others are chosen, so that a heap of old gains, each
    counted again only when it leads, finds the same choice as counting all.

    Parameters
    ----------
    windows : torch.Tensor of int64, shape (n, window)
    count : int
        How many to choose; all, if there are no more.

    Returns
    -------
    torch.Tensor of int64, shape (min(n, count),)
        Their places, rising.
    """
    if len(windows) <= count:
        return torch.arange(len(windows))
    kinds = [np.unique(row) for row in windows.numpy()]
    covered = np.zeros(int(windows.max()) + 1, dtype=bool)
    chosen: list[int] = []
    heap = _heap(range(len(kinds)), kinds)
    while len(chosen) < count:
        _, place = heapq.heappop(heap)
        gain = len(kinds[place]) - int(covered[kinds[place]].sum())
        if heap and (-gain, place) > heap[0]:
            heapq.heappush(heap, (-gain, place))
        elif gain == 0 and covered.any():
            covered[:] = False
            heap = _heap([place, *(other for _, other in heap)], kinds)
        else:
            chosen.append(place)
            covered[kinds[place]] = True
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def _heap(places: range | list[int], kinds: list[np.ndarray]) -> list[tuple[int, int]]:
    heap = [(-len(kinds[place]), place) for place in places]
    heapq.heapify(heap)
    return heap
