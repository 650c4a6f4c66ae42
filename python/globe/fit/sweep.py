"""One streamed pass over the experts of a family: measure a state, code its targets, sum the dictionary step."""

from __future__ import annotations

from dataclasses import replace

import torch

from globe.checkpoint.family import Family
from globe.compute import ranks
from globe.compute.blocks import Blocks
from globe.compute.gemm import correlations, matmul, mixtures, solver_dtype, storable
from globe.compute.passes import engine, within
from globe.compute.spd import gram_inverse
from globe.compute.stream import expert_batches
from globe.fit.codes import coding_step
from globe.fit.lefts import LeftFit, fit_lefts, row_energies, squared_errors
from globe.fit.sight import Sight
from globe.fit.sums import Errors, Measure, Refit, State, Sums
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.seeds.pool import Pool
from globe.settings import Settings


def measure(pool: Pool, state: State, job: Job, advance: Advance) -> Measure:
    """Refit every left factor and measure the error, in the pool's metric if it has one; one pass."""
    return measure_some(pool, state, job, advance, ranks.dealt(pool.family)).over_ranks().measure()


def sweep(pool: Pool, state: State, job: Job, advance: Advance) -> tuple[Measure, Sums]:
    """Measure a state, code the targets that its left factors imply, and sum the dictionary step's right side.

    The targets are T_i = A_i⁺ W_i on the training rows (`exact`, `aligned`), or the normalised proxies
    (`fixed`). One pass; an expert is measured, coded and summed while it is in hand. In a metric, whose rows must not
    mix where some are held out, experts and mixtures are seen through it (:class:`globe.fit.sight.Sight`). `aligned`
    then sums T_i = (D_i A_i)⁺ D_i W_i as they are: argmin Σ_i ‖(T_i − Σ_j α_ij B_j) L‖² with one L for all is MOD.
    """
    errors, sums = sweep_some(pool, state, job, advance, ranks.dealt(pool.family))
    errors = errors.over_ranks()
    return errors.measure(), replace(sums.over_ranks(), errors=errors.trained())


def measure_some(pool: Pool, state: State, job: Job, advance: Advance, some: slice) -> Errors:
    """The errors of the experts of these numbers, as for :func:`measure`."""
    family, settings, device = pool.family, job.settings, state.bank.device
    errors, sight = Errors.none(pool, device), Sight(state.bank, pool.metric, settings)
    mixed_room = _room(family, state, job.blocks)
    with engine(device) as workers:
        for span, batch in expert_batches(family, job.blocks.experts, device, some):
            mixed = mixtures(state.codes[span], state.bank, mixed_room)

            def refit(
                part: slice, batch: torch.Tensor = batch, mixed: torch.Tensor = mixed, span: slice = span
            ) -> Refit:
                return _refit(*sight.look(within(span, part), batch[part], mixed[part]), settings)[0]

            for part, found in workers.map(refit, len(batch)):
                errors.add(within(span, part), found)
                advance((part.stop - part.start) * ranks.size())
    return errors


def sweep_some(pool: Pool, state: State, job: Job, advance: Advance, some: slice) -> tuple[Errors, Sums]:
    """The errors and sums over the experts of these numbers, as for :func:`sweep`; those of others can be merged."""
    family, metric, settings, device = pool.family, pool.metric, job.settings, state.bank.device
    errors, sums = Errors.none(pool, device), Sums.none(pool, state, settings)
    sight = Sight(state.bank, metric, settings)
    proxy, held = (torch.from_numpy(index).to(device) for index in (pool.rows.proxy, pool.rows.validation))
    rank, exact = state.bank.shape[1], settings.mod == "exact"
    kept = solver_dtype(settings.precision, device)
    mixed_room, target_room = _room(family, state, job.blocks), _room(family, state, job.blocks)
    apart = exact or (metric is not None and settings.mod == "aligned")
    summand_room = _room(family, state, job.blocks) if apart else target_room
    gram_room = torch.empty(len(target_room), rank, rank, device=device) if exact else None
    with engine(device) as workers:
        for span, batch in expert_batches(family, job.blocks.experts, device, some):
            mixed = mixtures(state.codes[span], state.bank, mixed_room)
            targets, summands = target_room[: len(batch)], summand_room[: len(batch)]

            def work(
                part: slice, batch: torch.Tensor = batch, mixed: torch.Tensor = mixed, span: slice = span
            ) -> Refit:
                numbers = within(span, part)
                seen = sight.look(numbers, batch[part], mixed[part])
                found, fit = _refit(*seen, settings)
                if settings.mod == "fixed":
                    target_room[part] = _normalised(batch[part].index_select(1, proxy).float())
                    return found
                transposed = fit.lefts.index_fill(1, held, 0.0).mT.contiguous()
                inverse, normal, _ = gram_inverse(transposed, settings.ridge, settings.ridge_rcond)
                target_room[part], summand = sight.aim(numbers, transposed, inverse, batch[part], seen[0])
                if summand_room is not target_room:
                    summand_room[part] = summand
                if gram_room is not None:
                    gram_room[part] = normal
                return found

            for part, found in workers.map(work, len(batch)):
                errors.add(within(span, part), found)
                advance((part.stop - part.start) * ranks.size())
            matched = correlations(targets, state.bank)
            for alike, gram in sight.grams(span, workers):
                coding = matched[alike.start - span.start : alike.stop - span.start]
                sums.code(alike, coding_step(gram, coding, settings, state.temperature))
            left_grams = None
            if gram_room is not None:
                mixtures(sums.codes[span], state.bank, mixed_room)

                def subtract(part: slice, span: slice = span) -> None:
                    fitted = matmul(gram_room[part], mixed_room[part])
                    summand_room[part] -= sight.fitted(within(span, part), fitted)

                workers.run(subtract, len(batch))
                left_grams = storable(gram_room[: len(batch)], kept)
            sums.add(span, summands, left_grams, mixed_room)
    return errors, sums


def _normalised(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, k, d) of Frobenius norm one, but for those of zeros."""
    norms = torch.linalg.vector_norm(matrices.flatten(1), dim=1)
    return matrices / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None, None]


def _refit(weights: torch.Tensor, mixed: torch.Tensor, settings: Settings) -> tuple[Refit, LeftFit]:
    fit = fit_lefts(weights, mixed, settings)
    energies = row_energies(weights)
    return Refit(energies, squared_errors(weights, energies, mixed, fit, fit.lefts), fit.ridged), fit


def _room(family: Family, state: State, blocks: Blocks) -> torch.Tensor:
    """Memory for a matrix of the bank's shape per expert in hand."""
    return torch.empty(min(blocks.experts, len(family)), *state.bank.shape[1:], device=state.bank.device)
