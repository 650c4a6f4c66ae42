"""The settings of a compression: every key, its default, its meaning and its bounds."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from globe.errors import UsageError
from globe.settings.units import parse_bytes, parse_seconds


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is compressed. Each field is a key of the YAML file given to `--config`.

    Parameters
    ----------
    rank : float or int
        Rank r of the mixtures: a fraction of min(p, d) if below 1 or a float, a count of rows if an int.
    ratio : float, optional
        Stored weights over those of the touched matrices; rank and bank size are then planned for it, family by
        family, from a probe on a sample of experts. In place of `rank`, `bank_ratio` and `bank_size`.
    bank_ratio : float, optional
        Bank size m as a fraction of the family's N.
    bank_size : int, optional
        Bank size m. With neither: 128 where N ≥ 512, 64 where N ≥ 256, else N / 4 (specification, M).
    families : tuple of str
        Which of gate, up and down to compress; down is taken transposed.
    scope : {"global", "layer"} or int
        Which layers share a bank: all, none, or groups of so many consecutive ones. A family's atoms are dealt to
        its groups, so the stored bytes stay the same.
    share_families : bool
        One bank for all chosen families together, with the atoms of all of them.
    method : str
        The seeds (specification, A to F): ts-pca, left-gram, rpca, kmeans, farthest-first, residual-greedy,
        hybrid-split, hybrid-replace, aligned-pca or grouped-subspace; auto tries several and keeps the best (L).
    subspace_steps : int
        Steps of subspace iteration of grouped-subspace.
    seed_budget : float
        What `method: auto` may spend, as a multiple of the modelled cost of ts-pca.
    selector : {"energy", "uniform", "random"}
        Which rows of every expert make its proxy (specification, A.1).
    energy_experts : int
        The energy selector ranks rows, and aligned-pca finds its first reference, on at most this many evenly
        spaced experts.
    proxies : {"rows", "projected"}
        Proxies of kmeans, farthest-first, residual-greedy and the hybrids: the selected rows (specification, A), or
        the projections on the experts' leading left subspace (B).
    oversampling : int
        Random directions of rpca and residual-greedy beyond those wanted (specification, C).
    power_iterations : int
        Re-orthonormalised power iterations of rpca, two passes each.
    lloyd_steps : int
        Most Lloyd steps of kmeans after k-means++. 0: the centres are those of its first clusters.
    greedy_codes : {"nnls", "lasso"}
        Codes of residual-greedy and hybrid-replace on the atoms so far (specification, E); the lasso is
        non-negative too.
    greedy_l1 : float
        L1 penalty of that lasso, relative to the expert's largest correlation.
    hybrid_centres : {"kmeans", "farthest-first"}
        The second half of hybrid-split (specification, F).
    hybrid_share : float
        Share of the principal directions that hybrid-replace gives up for residual-greedy atoms.
    procrustes_rounds : int
        Rotations of aligned-pca, a pass each: to the experts' leading right subspace, then to the mean of the
        rotated proxies.
    solver : {"joint", "alternate"}
        The training, from the seeds on. joint: bank and codes together, with the left factors eliminated; alternate:
        the alternating loop (specification, H).
    joint_steps : int
        Gauss-Newton steps of the joint fit, each a pass over the family or a little more.
    mod : {"exact", "aligned", "fixed"}
        Dictionary step: the true normal equations, MOD on T_i = A_i⁺ W_i, or MOD on the proxies.
    outer_loops : int
        Loops of codes, dictionary, left factors, with `solver: alternate`. 0: seeds, NNLS codes and left factors only,
        with either solver.
    init_codes : {"nnls", "simplex"}
        Codes at the start: NNLS, or NNLS scaled to sum one.
    codes : {"entmax", "sparsemax", "nnls", "simplex", "signed"}
        Codes in the loop; signed ones are dense.
    entmax_alpha : float
        α of entmax, in (1, 2].
    support : int
        Target median support s_tgt of entmax and sparsemax codes.
    temperature : float
        Temperature T at the start.
    temperature_rate : float
        η of the temperature control.
    temperature_every : int
        K: the control acts every K loops.
    epsilon : float
        ε-prune: codes below ε times the expert's sum of codes are dropped before composing.
    l1 : float
        L1 penalty of `nnls` codes, relative to the expert's largest correlation.
    mod_ridge : float
        λ of the dictionary step, relative to the mean diagonal of its normal matrix.
    cg_steps : int
        Most preconditioned CG iterations of a step of the joint fit, and those of the exact dictionary step.
    over_relaxation : float
        Fraction of its own step by which the exact dictionary step overshoots; off once the error rises.
    coherence : float
        Weight c of a penalty on ‖G − I‖, G the Gram of the atoms, after every dictionary step:
        B ← (B + c G^(−1/2) B) / (1 + c).
    duplicate : float
        Of two atoms with an inner product above this one is re-seeded from an expert with a large error, as are atoms
        that no expert uses.
    ridge : float
        Ridge of ill-conditioned left factors, relative to the mean diagonal of B̃ B̃ᵀ.
    ridge_rcond : float
        A left factor is ill-conditioned when the Cholesky estimate of 1/cond(B̃ B̃ᵀ) is below this: then the
        Gram in fp32 and the left factor in bf16 lose more than the ridge does.
    validation_share : float
        Share of the rows of every expert held out of targets and dictionary (one row in 32). As many as the
        rank leaves free: none where r = p, and then the plateau is judged on all rows.
    tolerance : float
        Plateau: relative improvement of the validation error below this ...
    support_tolerance : float
        ... while the median support moves by at most this ...
    patience : int
        ... for this many loops in a row ends the loop early.
    device : {"auto", "cpu", "mps", "cuda"}
        Where the large GEMMs run.
    precision : {"auto", "fp32"}
        auto: bf16 products where the CPU has them and they are exact or lose nothing that matters; fp32 refuses them.
    max_memory : int, optional
        Ceiling of the process's resident memory in bytes (on the command line and in YAML also as 6GiB); half of the
        machine's memory if not given.
    time_limit : float, optional
        Wall seconds that a run may take from its start, writing included (on the command line and in YAML also as 90s,
        40m, 2h, 1h30m). Steps and loops are those that fit, up to `joint_steps` and `outer_loops`, and the best state
        by then is written; how many fit depends on the machine, so such a run is not reproducible. A run that goes on
        from an earlier one has all of its own limit.
    seed : int
        Seed of the random row selector, of rpca's and residual-greedy's random directions, and of k-means++.
    threads : int, optional
        CPU threads; if not given, as many as processors that this process may use (affinity and control groups).
    calibrate : str
        Activation statistics: none is weight-only; pydoc measures them on texts that ship with Python, self on samples
        of the model itself, auto on both in equal shares, as far as the model can be run; or a file of `globe
        calibrate`.
    calibration_tokens : int, optional
        Most tokens of these texts; if not given, 64 for each of the model's d inputs, from 32,768 to 131,072.
    correct : {"none", "down"}
        down: what the compressed layers get wrong is taken up by `down`, left dense, or by its left factors where it is
        factored: refitted in closed form, layer after layer, on the calibration text, as far as a quarter of it that is
        held out agrees. Stored sizes do not change.
    metric : {"fisher", "residual"}
        What an error of an expert's product is weighed by: the loss of the next token, as far as the calibration knows
        its Fisher information; or its size beside the residual stream.
    metric_rows : float
        For residual: power of the row weights: 1 weighs a row by its effect on the expert's output, 0 not at all.
    metric_layers : float
        For residual: power of the inverse residual stream by which layers are weighed.
    metric_shrinkage : float
        Tokens that the layer's diagonal counts for beside an expert's own, where a calibration has no more of it.
    factor_bits : {16, 8, 4, 3}
        Bits that a value of the factors is stored in: 16 is bf16; below, integers with a bf16 scale for each group.
    left_bits : {16, 8, 4, 3}, optional
        Of left factors; `factor_bits` if not given.
    atom_bits : {16, 8, 4, 3}, optional
        Of atoms; `factor_bits` if not given.
    group_size : int
        Values along the rank r of a left factor, or along the d inputs of an atom, that share a scale; has to divide
        them.
    """

    rank: float | int = 0.75
    ratio: float | None = None
    bank_ratio: float | None = None
    bank_size: int | None = None
    families: tuple[str, ...] = ("gate", "up")
    scope: Literal["global", "layer"] | int = "global"
    share_families: bool = False
    method: Literal[
        "ts-pca",
        "left-gram",
        "rpca",
        "kmeans",
        "farthest-first",
        "residual-greedy",
        "hybrid-split",
        "hybrid-replace",
        "aligned-pca",
        "grouped-subspace",
        "auto",
    ] = "grouped-subspace"
    subspace_steps: int = 6
    seed_budget: float = 16.0
    selector: Literal["energy", "uniform", "random"] = "energy"
    energy_experts: int = 256
    proxies: Literal["rows", "projected"] = "rows"
    oversampling: int = 8
    power_iterations: int = 1
    lloyd_steps: int = 20
    greedy_codes: Literal["nnls", "lasso"] = "nnls"
    greedy_l1: float = 0.1
    hybrid_centres: Literal["kmeans", "farthest-first"] = "kmeans"
    hybrid_share: float = 0.25
    procrustes_rounds: int = 1
    solver: Literal["joint", "alternate"] = "joint"
    joint_steps: int = 12
    mod: Literal["exact", "aligned", "fixed"] = "exact"
    outer_loops: int = 6
    init_codes: Literal["nnls", "simplex"] = "nnls"
    codes: Literal["entmax", "sparsemax", "nnls", "simplex", "signed"] = "entmax"
    entmax_alpha: float = 1.5
    support: int = 12
    temperature: float = 1.0
    temperature_rate: float = 0.5
    temperature_every: int = 1
    epsilon: float = 1e-3
    l1: float = 0.0
    mod_ridge: float = 1e-4
    cg_steps: int = 8
    over_relaxation: float = 0.8
    coherence: float = 0.0
    duplicate: float = 0.999
    ridge: float = 1e-6
    ridge_rcond: float = 1e-5
    validation_share: float = 1 / 32
    tolerance: float = 1e-4
    support_tolerance: float = 1.0
    patience: int = 3
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    precision: Literal["auto", "fp32"] = "auto"
    max_memory: int | None = None
    time_limit: float | None = None
    seed: int = 0
    threads: int | None = None
    calibrate: str = "auto"
    calibration_tokens: int | None = None
    correct: Literal["none", "down"] = "none"
    metric: Literal["fisher", "residual"] = "fisher"
    metric_rows: float = 1.0
    metric_layers: float = 1.0
    metric_shrinkage: float = 4096.0
    factor_bits: int = 16
    left_bits: int | None = None
    atom_bits: int | None = None
    group_size: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.max_memory, str):
            object.__setattr__(self, "max_memory", parse_bytes(self.max_memory))  # type: ignore[unreachable]
        if isinstance(self.time_limit, str):
            object.__setattr__(self, "time_limit", parse_seconds(self.time_limit))  # type: ignore[unreachable]
        _require(isinstance(self.families, list | tuple), "families", self.families, "any of gate, up and down")
        object.__setattr__(self, "families", tuple(self.families))
        hints = typing.get_type_hints(Settings)
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if typing.get_origin(hint) is Literal:
                _require(
                    value in typing.get_args(hint), field.name, value, f"one of {', '.join(typing.get_args(hint))}"
                )
            elif field.name not in ("families", "scope", "share_families", "calibrate", *_BITS_OF):
                _require(_is_number(value, hint), field.name, value, "a number" if hint is not int else "an integer")
        for name in self.families:
            _require(name in ("gate", "up", "down"), "families", name, "any of gate, up and down")
        _require(len(set(self.families)) == len(self.families) > 0, "families", self.families, "each family once")
        for name in _BITS_OF:
            bits = getattr(self, name)
            _require(bits is None or (type(bits) is int and bits in BITS), name, bits, "16, 8, 4 or 3")
        several = type(self.scope) is int and self.scope >= 1
        _require(
            several or self.scope in ("global", "layer"), "scope", self.scope, "global, layer or a count of layers"
        )
        _require(type(self.share_families) is bool, "share_families", self.share_families, "true or false")
        named = isinstance(self.calibrate, str) and self.calibrate != ""
        _require(named, "calibrate", self.calibrate, "auto, self, pydoc, none or a file of globe calibrate")
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            _require(value is None or low <= value <= high, name, value, f"a value from {low} to {high}")
        _require(self.rank > 0, "rank", self.rank, "a fraction in (0, 1] or a count of at least 1")
        _require(1 < self.entmax_alpha <= 2, "entmax_alpha", self.entmax_alpha, "a value in (1, 2]")
        if self.bank_ratio is not None and self.bank_size is not None:
            raise UsageError("bank_ratio and bank_size are both given; give one of them")
        if self.ratio is not None:
            given = [name for name in SIZES if getattr(self, name) != _DEFAULTS[name]]
            _require(0 < self.ratio < 1, "ratio", self.ratio, "a value between 0 and 1")
            if given:
                raise UsageError(f"ratio and {given[0]} are both given; ratio plans rank and bank size: leave one out")
        if self.correct == "down" and self.calibrate == "none":
            raise UsageError(
                "correct is down with calibrate none, which gives it no text; expected a calibration, or correct none"
            )
        if self.correct == "down" and "down" in self.families and self.stored_bits[0] < 16:
            raise UsageError(
                f"correct is down with left factors of down in {self.stored_bits[0]} bits; expected left_bits 16, "
                "families without down, or correct none"
            )
        if self.l1 > 0 and self.codes != "nnls":
            raise UsageError(
                f"l1 is {self.l1} with codes {self.codes}: on the simplex the L1 norm is constant; use codes nnls"
            )

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        """The values that a setting of named values may take."""
        return typing.get_args(typing.get_type_hints(cls)[name])

    def resolve_rank(self, p: int, d: int) -> int:
        """The rank r for p × d matrices; a fraction is of min(p, d).

        >>> Settings(rank=0.75).resolve_rank(1408, 2048), Settings(rank=512).resolve_rank(1408, 2048)
        (1056, 512)
        """
        limit = min(p, d)
        rank = round(self.rank * limit) if isinstance(self.rank, float) and self.rank <= 1 else int(self.rank)
        if rank != self.rank and not (isinstance(self.rank, float) and self.rank <= 1):
            raise UsageError(f"rank is {self.rank}; expected a fraction in (0, 1] or a whole number of rows")
        if not 1 <= rank <= limit:
            raise UsageError(f"rank is {self.rank}, which is {rank} rows; expected 1 to min(p, d) = {limit}")
        return rank

    def resolve_bank(self, experts: int) -> int:
        """The bank size m for a family of N experts.

        >>> Settings().resolve_bank(1440), Settings().resolve_bank(120), Settings(bank_ratio=0.125).resolve_bank(120)
        (128, 30, 15)
        """
        if self.bank_size is not None:
            size = self.bank_size
        elif self.bank_ratio is not None:
            size = max(1, round(self.bank_ratio * experts))
        else:
            size = 128 if experts >= 512 else 64 if experts >= 256 else max(1, experts // 4)
        if not 1 <= size <= experts:
            raise UsageError(f"bank size is {size}; expected 1 to the family's {experts} experts")
        return size

    @property
    def stored_bits(self) -> tuple[int, int]:
        """The bits of left factors, and those of atoms."""
        left, atoms = self.left_bits, self.atom_bits
        return self.factor_bits if left is None else left, self.factor_bits if atoms is None else atoms

    def expected_support(self, bank: int) -> int:
        """The non-zero codes of an expert that are planned for, on a bank of this size."""
        steered = self.codes in ("entmax", "sparsemax") and self.outer_loops > 0
        return min(bank, self.support) if steered else max(1, bank // 2)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, ready for YAML and JSON."""
        return {**dataclasses.asdict(self), "families": list(self.families)}


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Settings)}
SIZES = ("rank", "bank_size", "bank_ratio")
BITS = (16, 8, 4, 3)
_BITS_OF = ("factor_bits", "left_bits", "atom_bits")
_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("bank_ratio", 0, 1),
    ("bank_size", 1, 1 << 20),
    ("energy_experts", 1, 1 << 30),
    ("oversampling", 0, 1 << 20),
    ("power_iterations", 0, 100_000),
    ("lloyd_steps", 0, 100_000),
    ("greedy_l1", 0, 1),
    ("hybrid_share", 0, 1),
    ("procrustes_rounds", 1, 100_000),
    ("subspace_steps", 1, 100_000),
    ("seed_budget", 1, 1e6),
    ("outer_loops", 0, 100_000),
    ("joint_steps", 1, 100_000),
    ("calibration_tokens", 64, 1 << 40),
    ("metric_rows", 0, 2),
    ("metric_layers", 0, 2),
    ("metric_shrinkage", 0, 1e12),
    ("support", 1, 1 << 20),
    ("temperature", 1e-3, 1e3),
    ("temperature_rate", 0, 10),
    ("temperature_every", 1, 100_000),
    ("epsilon", 0, 0.5),
    ("l1", 0, 1),
    ("mod_ridge", 0, 1),
    ("cg_steps", 1, 10_000),
    ("over_relaxation", 0, 1),
    ("coherence", 0, 1e6),
    ("duplicate", 0, 1),
    ("ridge", 0, 1),
    ("ridge_rcond", 0, 1),
    ("validation_share", 0, 0.5),
    ("tolerance", 0, 1),
    ("support_tolerance", 0, 1 << 20),
    ("patience", 1, 100_000),
    ("seed", 0, 2**63 - 1),
    ("threads", 1, 4096),
    ("group_size", 32, 128),
    ("max_memory", 1 << 20, 1 << 50),
    ("time_limit", 1, 1e9),
)


def _is_number(value: object, hint: object) -> bool:
    allowed = typing.get_args(hint) or (hint,)
    if value is None:
        return type(None) in allowed
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        return False
    return isinstance(value, int) or float in allowed


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise UsageError(f"{name} is {value!r}; expected {expected}")
