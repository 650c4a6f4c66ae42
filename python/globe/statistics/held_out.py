"""What a calibration has not read of the texts that it was of: to judge a model on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.json_file import read_json
from globe.errors import GlobeError, UsageError
from globe.statistics.calibration import Calibration
from globe.statistics.documents import EVALUATION
from globe.statistics.mixture import SELF
from globe.statistics.windows import documents_of


@dataclass(frozen=True)
class HeldOut:
    """By what the held-out halves of a calibration's texts are found again.

    Parameters
    ----------
    texts : tuple of str
        Their names, as a calibration file has them.
    samples : torch.Tensor of int64, shape (n, length), optional
        Token ids that the model itself wrote and that were not calibrated on: the half of ``self``.
    """

    texts: tuple[str, ...]
    samples: torch.Tensor | None

    @staticmethod
    def of(calibration: Calibration) -> HeldOut:
        """What a calibration holds out."""
        names = tuple(text["name"] for text in calibration.about.get("texts", []))
        return HeldOut(names, calibration.tokens("held_out_samples"))

    def text(self) -> str:
        """As JSON."""
        samples = self.samples.tolist() if self.samples is not None else None
        return json.dumps({"texts": self.texts, "samples": samples}) + "\n"


def read_held_out(path: Path) -> HeldOut | None:
    """What `HeldOut.text` has left in a file; None where there is no such file.

    Raises
    ------
    GlobeError
        If the file is damaged.
    """
    if not path.exists():
        return None
    told: dict[str, Any] = read_json(path)
    try:
        samples = torch.tensor(told["samples"], dtype=torch.int64) if told["samples"] is not None else None
        if not all(isinstance(name, str) for name in told["texts"]) or (samples is not None and samples.ndim != 2):
            raise ValueError
        return HeldOut(tuple(told["texts"]), samples)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        raise GlobeError(f"{path}: damaged; expected texts (names) and samples (equally long lists of ids)") from None


def held_out_texts(held_out: HeldOut, tokenizer: Any, note: Callable[[str], None]) -> dict[str, str | torch.Tensor]:
    """The held-out half of every text of a calibration.

    Parameters
    ----------
    held_out : HeldOut
        Names the texts; files and folders are read again.
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
    for name in held_out.texts:
        if name == SELF:
            if held_out.samples is not None:
                found[name] = held_out.samples
            continue
        try:
            content = "\n\n".join(each.render(tokenizer) for each in documents_of(name, EVALUATION, note))
        except (GlobeError, UsageError) as error:
            note(f"not judged on the held-out half of {name}: {error}")
            continue
        if content.strip():
            found[name] = content
    return found
