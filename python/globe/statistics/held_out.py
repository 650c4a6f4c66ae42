"""What a calibration has not read of the texts that it was of: to judge a model on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from globe.errors import GlobeError, UsageError
from globe.statistics.calibration import Calibration
from globe.statistics.documents import EVALUATION
from globe.statistics.mixture import SELF
from globe.statistics.windows import documents_of


def held_out_texts(
    calibration: Calibration, tokenizer: Any, note: Callable[[str], None]
) -> dict[str, str | torch.Tensor]:
    """The held-out half of every text of a calibration.

    Parameters
    ----------
    calibration : Calibration
        Its `about["texts"]` names the texts; files and folders are read again.
    tokenizer : Any
        The model's, whose chat template conversations go through.
    note : callable
        Told of texts that are not there any more, or were given as such: they are left out.

    Returns
    -------
    dict
        By their names: a text, or for ``self`` samples that were not calibrated on, token ids (n, length) in 64 bits.
    """
    found: dict[str, str | torch.Tensor] = {}
    for text in calibration.about.get("texts", []):
        name = text["name"]
        if name == SELF:
            samples = calibration.tokens("held_out_samples")
            if samples is not None:
                found[name] = samples
            continue
        try:
            content = "\n\n".join(each.render(tokenizer) for each in documents_of(name, EVALUATION, note))
        except (GlobeError, UsageError) as error:
            note(f"not judged on the held-out half of {name}: {error}")
            continue
        if content.strip():
            found[name] = content
    return found
