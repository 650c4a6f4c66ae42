"""A reading with the samples of the model itself that it asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from globe.compute.devices import device_room
from globe.errors import GlobeError
from globe.runs.stages import Stages
from globe.statistics.layerwise import Layerwise, NotFinite
from globe.statistics.manner import Manner
from globe.statistics.mixture import PYDOC, mixture
from globe.statistics.own import Wanted, own_samples
from globe.statistics.windows import Ask, Reading, read_windows


@dataclass(frozen=True)
class Means:
    """How a model is run, in how many bytes of memory, and where that is shown."""

    manner: Manner
    limit: int
    stages: Stages


def with_own_samples(reading: Reading, ask: Ask, means: Means, optional: bool) -> tuple[Reading, str | None]:
    """The reading with its samples.

    Parameters
    ----------
    reading : Reading
        Of `ask`; as it is where that asks for no samples.
    ask : Ask
    means : Means
    optional : bool
        Where samples cannot be made, or would take reading the model for every token, read what Python carries alone,
        and say so.

    Returns
    -------
    tuple
        The reading, and why it has no samples although it asked for them.

    Raises
    ------
    GlobeError
        Where samples cannot be made and are not optional.
    """
    if reading.wanted is None:
        return reading, None
    try:
        return reading.with_samples(_samples(reading.wanted, reading, means, from_disk=not optional)), None
    except NotFinite:
        raise
    except GlobeError as error:
        if not optional:
            raise
        log = means.stages.display.log
        log(f"no samples of the model itself, {PYDOC} alone: {error}")
        return read_windows(reading.checkpoint, replace(ask, texts=mixture({PYDOC: 1})), log), str(error)


def _samples(wanted: Wanted, reading: Reading, means: Means, from_disk: bool) -> torch.Tensor:
    device = means.manner.device
    room = device_room(device)
    limit = means.limit if room is None else min(means.limit, room)
    streamed = Layerwise(reading.checkpoint, device, reading.trust_remote_code, means.manner.precision)
    return own_samples(streamed, wanted, limit, means.stages, from_disk)
