"""Whether this process is one of many that torchrun has started, as its environment tells."""

from __future__ import annotations

import os

SHARING = "GLOBE_SHARING"  # set for the jobs that a batch runs at a time
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_ranks() -> int:
    """How many processes were started together; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _NAMES) else 1


def launched_rank() -> int:
    """This process's number among them."""
    return int(os.environ["RANK"]) if launched_ranks() > 1 else 0


def launched_restarts() -> int:
    """How often torchrun has started them again (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_rank() -> int:
    """Its number among those on this machine, by which it takes a GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched_ranks() > 1 else 0


def local_ranks() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched_ranks() > 1 else 1


def sharing() -> int:
    """How many of GloBE's processes share this machine's processors and memory: ranks, or jobs of a batch."""
    return max(local_ranks(), int(os.environ.get(SHARING, "1")))


def environment_alone() -> dict[str, str]:
    """The environment of a process that works for this one: not one of the ranks, on this one's GPU, in its share."""
    if launched_ranks() == 1:
        return dict(os.environ)
    kept = {name: value for name, value in os.environ.items() if name not in _NAMES}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else [str(number) for number in range(local_ranks())]
    return {**kept, "CUDA_VISIBLE_DEVICES": devices[local_rank() % len(devices)], SHARING: str(sharing())}
