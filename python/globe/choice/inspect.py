"""What a checkpoint holds, and what a choice of rank and bank size would save: from headers only."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from globe.checkpoint.family import Family
from globe.checkpoint.formats.encoded import stored_as
from globe.checkpoint.hub import headers
from globe.checkpoint.index import Checkpoint, uncollected
from globe.errors import UsageError
from globe.settings import Settings
from globe.sizes.pools import storage
from globe.sizes.ratios import Shape, ratios

_RANKS = (1.0, 0.75, 0.5, 0.25)
_BANK_RATIOS = (0.125, 1 / 6, 0.25)


def inspect(model: Path | str, settings: Settings | None = None, *, estimated: bool = False) -> dict[str, Any]:
    """Describe a checkpoint and its choices of rank and bank size.

    Parameters
    ----------
    model : Path or str
        A dense checkpoint directory, or its name on the hub (NAMESPACE/NAME, with @REVISION): no weights are fetched.
    settings : Settings, optional
        Which families are chosen, the bits of their factors, and the target support that their codes are counted
        with; all of them for an estimate.
    estimated : bool
        Time this machine's products for a second or two, and say what a compression would take.

    Returns
    -------
    dict
        `architecture`, `layout`, `families` (N, layers, p, d, dtype, bytes, floor r/d at the default rank),
        `bytes` on three axes, `chosen` families, `bits` of the factors and the `group` that
        shares a scale, and `choices`: rank, bank size and the ratio on three axes with these.
        With `settings.ratio`, the choices are those of a family that store so much of it.
        `notes` tell what of the directory no output will have. Where asked for, `estimate`: `seconds`, in all and by
        `stages`; `peak_bytes` of resident memory, in all and by stage (`peaks`); `scratch_bytes` of disk beside the
        output while it is made; `gflops`, the rate of fp32 products that was found; `device`, `threads`.

    Raises
    ------
    GlobeError
        If the directory is not a checkpoint of a known layout, or experts are missing; for an estimate, if it cannot
        be compressed with these settings.
    """
    with headers(model) as directory, uncollected():
        return {"model": str(model), **_described(directory, settings or Settings(), estimated)}


def _described(directory: Path, settings: Settings, estimated: bool) -> dict[str, Any]:
    checkpoint = Checkpoint(directory)
    everything = {name: checkpoint.family(name) for name in checkpoint.layout.families}
    families = checkpoint.chosen(settings.families)
    first = next(iter(families.values()))
    choices = []
    for rank, bank in _pairs(first, settings):
        shape = Shape(rank, bank, min(bank, settings.support) * len(first), storage(settings))
        saved = ratios(checkpoint, families, dict.fromkeys(families, shape))
        choices.append({"rank": rank, "bank": bank, "floor": rank / first.d, "ratio": asdict(saved)})
    described = {
        name: {
            "experts": len(family),
            "layers": family.layers,
            "p": family.p,
            "d": family.d,
            "dtype": ", ".join(sorted({stored_as(expert.info) for expert in family.experts})),
            "bytes": family.stored_bytes,
            "floor": settings.resolve_rank(family.p, family.d) / family.d,
        }
        for name, family in everything.items()
    }
    architectures = checkpoint.config.get("architectures")
    told = {}
    if estimated:  # whose modules take a second to import, a quarter of all that a checkpoint of 671 B takes
        from globe.choice.estimate import estimate, measured_rates
        from globe.choice.plan import plan
        from globe.compute.devices import thread_count

        planned = plan(directory, settings)
        told["estimate"] = {
            **estimate(planned, settings, measured_rates(planned, settings)).as_dict(),
            "device": str(planned.device),
            "threads": thread_count(settings.threads),
        }
    return {
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "model_type": checkpoint.config["model_type"],
        "layout": checkpoint.layout.name,
        "layers": checkpoint.layers,
        "shards": len(checkpoint.shards),
        "families": described,
        "bytes": {
            "touched": sum(family.stored_bytes for family in families.values()),
            "experts": checkpoint.expert_bytes(),
            "checkpoint": sum(info.nbytes for info in checkpoint.tensors.values()),
        },
        "chosen": list(families),
        "bits": {**storage(settings).bits, "group": settings.group_size},
        "choices": choices,
        "notes": checkpoint.notes,
        **told,
    }


def _pairs(family: Family, settings: Settings) -> list[tuple[int, int]]:
    """Ranks and bank sizes worth showing: all that store the ratio asked for, or a grid."""
    if settings.ratio is not None:
        from globe.choice.ratio_plan import candidates

        return [(size.rank, size.bank) for size in candidates(family, settings.ratio, how=storage(settings))]
    sizes = {max(1, round(share * len(family))) for share in _BANK_RATIOS}
    try:
        sizes.add(settings.resolve_bank(len(family)))
    except UsageError:
        pass
    step, least = storage(settings).step, min(family.p, family.d)
    ranks = sorted({max(step, round(fraction * least / step) * step) for fraction in _RANKS}, reverse=True)
    return [(rank, bank) for rank in ranks for bank in sorted(sizes)]
