"""What the stages of a compression have to do, from shapes alone: operations, and bytes moved, read and written."""

from __future__ import annotations

from dataclasses import dataclass

from globe.checkpoint.family import Family
from globe.checkpoint.formats.packed import Packing
from globe.settings import Settings
from globe.sizes.flops import (
    SAMPLED,
    codes_flops,
    iteration_flops,
    own_iteration_flops,
    own_pass_flops,
    pass_flops,
    preconditioner_flops,
    sample_flops,
    weighing_flops,
)
from globe.sizes.kept import Kept
from globe.sizes.own import own_directions
from globe.sizes.ratios import Shape, stored_bytes


@dataclass(frozen=True)
class Work:
    """Floating-point operations in fp32, in fp64 and in the dtype of conjugate gradients.

    Beside them bytes that pass through memory, are read from disk and written, and `calls` of single experts, which
    cost time beside all that.
    """

    flops: float = 0.0
    wide: float = 0.0
    solver: float = 0.0
    moved: float = 0.0
    read: float = 0.0
    written: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in self._values()))

    def _values(self) -> tuple[float, ...]:
        return self.flops, self.wide, self.solver, self.moved, self.read, self.written, self.calls


@dataclass(frozen=True)
class Task:
    """A pool to fit, and how.

    Parameters
    ----------
    family, shape, settings
    sparse : bool
        Whether mixtures and sums over experts take the codes that are not zero alone, as on a CPU.
    """

    family: Family
    shape: Shape
    settings: Settings
    sparse: bool

    @property
    def weighed(self) -> bool:
        """Whether a metric is expected."""
        return self.settings.calibrate != "none"

    @property
    def own(self) -> int:
        """Directions of an expert's own moment that may be expected."""
        return own_directions(len(self.family), self.family.d) if self.weighed else 0

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """N, p, d, r, m."""
        return len(self.family), self.family.p, self.family.d, self.shape.rank, self.shape.bank

    @property
    def stored(self) -> int:
        """Bytes of a pass over the weights."""
        return self.family.stored_bytes

    def gram(self, width: int) -> int:
        """Operations of X Xᵀ for X (r, `width`), of which a CPU computes a half."""
        return (1 if self.sparse else 2) * self.shape.rank**2 * width

    def mixing(self, width: int) -> Work:
        """Of one mixture of (r, `width`) matrices, or of one sum over experts."""
        _, _, _, r, m = self.sizes
        if not self.sparse:
            return Work(flops=2 * m * r * width)
        used = min(m, self.settings.support if self.settings.codes in ("entmax", "sparsemax") else m // 2 + 1)
        return Work(moved=4 * (used + 2) * r * width)


def scan_work(family: Family) -> Work:
    """Of reading all experts once for their energies."""
    count = len(family)
    return Work(moved=16 * count * family.p * family.d, read=family.stored_bytes, calls=count)


def seeds_work(method: str, task: Task) -> Work:
    """Of a method's seeds; a method that is not known here counts as left-gram."""
    n, p, d, r, m = task.sizes
    read = n * p * d * task.family.bytes_per_weight
    rows = r / p * read
    pca = Work(flops=float(n * n * r * d + 2 * n * m * r * d))
    projected = Work(flops=float(n * p * p * d + 10 * p**3 + 2 * n * p * r * d), read=2 * read + rows)
    if method == "ts-pca":
        return pca + Work(read=2 * rows)
    if method == "grouped-subspace":
        steps = task.settings.subspace_steps + 1
        products = n * p * d * d + 128 * n * p * d + m * steps * (2 * d * d * r + 4 * d * r * r)
        return Work(flops=float(products), read=2 * read)
    if method == "rpca":
        return projected + Work(flops=8.0 * n * m * r * d + 4.0 * m * m * r * d, read=4 * rows)
    if method == "residual-greedy":
        return pca + Work(flops=2.0 * n * m**3 + 400.0 * m * n * n, read=2 * rows)
    return projected + pca + Work(read=2 * rows)


def joint_start_work(task: Task) -> Work:
    """Of making W'_i of all experts."""
    n, p, d, _, _ = task.sizes
    flops = weighing_flops(p, d, task.weighed and "down" in task.family.families) if task.weighed else 0
    return Work(flops=n * flops, moved=8 * n * p * d, read=task.stored)


def joint_pass_work(task: Task, held: Kept) -> Work:
    """Of one pass of the joint fit; what lies on disk is read or written."""
    n, p, d, r, m = task.sizes
    flops: float = pass_flops(p, d, r, m, task.weighed) - 4 * r * r * d
    flops += sample_flops(d, r, task.weighed) * min(n, SAMPLED) / n
    flops += own_pass_flops(d, r, task.own) + codes_flops(d, r, min(m, task.settings.support) if task.sparse else m)
    wide = 4 * r * r * d + 4 * r**3 / 3
    if task.sparse:
        flops -= 2 * (2 * m * r * d) + 2 * m * r * r
    sums = task.mixing(d) * 2 + task.mixing(r) if task.sparse else Work()
    moved = Work(moved=4 * (8 * r * d + 4 * r * r + 2 * p * d + 4 * d * d * (1 if task.weighed else 0)))
    each = Work(flops=flops, wide=wide, calls=2) + sums + moved
    return each * n + Work(read=held.on_disk / 2, written=held.on_disk / 2)


def iteration_work(task: Task, held: Kept) -> Work:
    """Of one product with the Gauss-Newton matrix, and what comes with it in an iteration."""
    n, _, d, r, m = task.sizes
    flops = iteration_flops(d, r, m, task.weighed) + own_iteration_flops(d, r, task.own)
    mixed = Work()
    if task.sparse:
        flops -= 3 * 2 * m * r * d
        mixed = task.mixing(d) * 3
    each = Work(solver=flops, moved=4 * 4 * r * d, calls=1) + mixed
    vectors = Work(flops=preconditioner_flops(d, r, m, task.weighed), moved=4 * 24 * m * r * d, calls=2 * m)
    return each * n + vectors + Work(read=held.on_disk / 2)


def step_work(task: Task, held: Kept, iterations: int) -> Work:
    """Of one step of the joint fit: its iterations, what they are preconditioned with, a pass, and a saved state."""
    _, _, d, r, m = task.sizes
    setup = Work(wide=m * (4 * r**3 / 3) + 10 * d**3, moved=8 * m * r * d, written=8 * m * r * d)
    return setup + iteration_work(task, held) * (iterations + 1) + joint_pass_work(task, held)


def sweep_work(task: Task) -> Work:
    """Of the pass of one loop: left factors, their errors, targets, correlations, sums of the dictionary step."""
    n, p, d, r, m = task.sizes
    flops = 4 * p * d * r + 2 * p * r * r + 4 * r * r * d + 2 * m * r * d
    flops += 0 if task.sparse else 2 * p * d * r
    if task.weighed:
        flops += 2 * (p + r) * d * d + 12 * r * d * d
    each = Work(flops=flops, wide=task.gram(d) + task.gram(p) + 2 * r**3, moved=4 * 12 * r * d, calls=3)
    layers = task.family.layers if task.weighed else 0
    coded = Work(flops=layers * 2 * m * r * d * d, wide=max(layers, 1) * m * m * r * d)
    return (each + task.mixing(d) * 3) * n + coded + Work(read=task.stored)


def dictionary_work(task: Task) -> Work:
    """Of one dictionary step."""
    n, _, d, r, m = task.sizes
    if task.settings.mod != "exact":
        return Work(flops=2 * m * m * r * d, wide=m**3)
    through = 2 * r * d * d if task.weighed else 0
    each = Work(flops=2 * r * r * d + through, moved=4 * 4 * r * d, calls=1) + task.mixing(d) * 2
    setup = Work(wide=m * 2 * r**3) + task.mixing(r) * n
    vectors = Work(flops=2 * m * r * r * d + (2 * m * r * d * d if task.weighed else 0), moved=4 * 12 * m * r * d)
    return setup + (each * n + vectors) * task.settings.cg_steps


def proxies_work(task: Task) -> Work:
    """Of the error on proxies."""
    n, _, d, r, m = task.sizes
    return Work(flops=2 * n * m * r * d + m * m * r * d, moved=8 * n * r * d, read=task.stored * r / task.family.p)


def lefts_work(task: Task) -> Work:
    """Of the left factors as stored, their errors, and what they take on disk."""
    n, p, d, r, _ = task.sizes
    products = 2 * p * d * r + 4 * p * r * r + (0 if task.sparse else 2 * p * d * r)
    wide = task.gram(d) + 2 * r**3
    if task.weighed:
        products += 2 * (p + r) * d * d + 4 * p * r * d
    each = Work(flops=products, wide=wide, moved=4 * (6 * p * d + 4 * r * d), calls=2) + task.mixing(d)
    packing = task.shape.storage.lefts
    if packing is not None:
        each += rounding_work(p, r, packing)
    return each * n + Work(read=task.stored, written=stored_bytes(task.family, task.shape))


def rounding_work(rows: int, columns: int, packing: Packing) -> Work:
    """Of rounding a matrix with feedback: factors of the Hessian, and what every column does to those that follow."""
    across = 12 * rows * columns * packing.group + 12 * rows * columns * columns / packing.group
    return Work(flops=rows * columns**2, wide=4 / 3 * columns**3, moved=across, calls=1)
