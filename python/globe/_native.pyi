import numpy as np
from numpy.typing import NDArray

def compose(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    bank: NDArray[np.float32] | NDArray[np.uint16],
    bank_dtype: str,
    out: NDArray[np.float32] | NDArray[np.uint16],
    out_dtype: str,
    epsilon: float,
    threads: int,
) -> None: ...
def compose_code_gradient(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    gradient: NDArray[np.float32] | NDArray[np.uint16],
    gradient_dtype: str,
    bank: NDArray[np.float32] | NDArray[np.uint16],
    bank_dtype: str,
    threads: int,
) -> NDArray[np.float64]: ...
def compose_matmul(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    bank: NDArray[np.float32] | NDArray[np.uint16],
    bank_dtype: str,
    rows: NDArray[np.int64],
    x: NDArray[np.float32] | NDArray[np.uint16],
    x_dtype: str,
    out: NDArray[np.float32] | NDArray[np.uint16],
    out_dtype: str,
    threads: int,
) -> None: ...
def entmax(
    logits: NDArray[np.floating],
    out: NDArray[np.floating],
    alpha: float,
    temperature: float,
    epsilon: float,
    threads: int,
) -> None: ...
def entmax_backward(
    probabilities: NDArray[np.floating],
    gradient: NDArray[np.floating],
    out: NDArray[np.floating],
    alpha: float,
    temperature: float,
    threads: int,
) -> None: ...
def gram_add(
    vectors: NDArray[np.float32] | NDArray[np.uint16],
    dtype: str,
    gram: NDArray[np.float64],
    weights: NDArray[np.float32] | None,
    threads: int,
) -> None: ...
def gram_mirror(gram: NDArray[np.float64]) -> None: ...

class ExpertFamily:
    def __init__(
        self,
        matrices: NDArray[np.generic],
        dtype: str,
        atoms: NDArray[np.generic] = ...,
        atoms_dtype: str = ...,
        indptr: NDArray[np.int64] = ...,
        indices: NDArray[np.int32] = ...,
        values: NDArray[np.float32] = ...,
        first: int = ...,
        step: int = ...,
    ) -> None: ...
    def place(self, addresses: NDArray[np.uintp]) -> None: ...

def layer_forward(
    gate: ExpertFamily,
    up: ExpertFamily,
    down: ExpertFamily,
    gate_mixtures: NDArray[np.uintp] | None,
    up_mixtures: NDArray[np.uintp] | None,
    down_mixtures: NDArray[np.uintp] | None,
    dtype: str,
    activation: int,
    experts: int,
    picked: NDArray[np.int64],
    weights: NDArray[np.float32],
    tokens: NDArray[np.generic],
    out: NDArray[np.generic],
    threads: int,
) -> None: ...
def nnls(
    gram: NDArray[np.float64],
    correlations: NDArray[np.float64],
    l1: float,
    simplex: bool,
    tolerance: float,
    max_iterations: int,
    max_support: int,
    warm_start: NDArray[np.bool_] | None,
    codes: NDArray[np.float64],
    status: NDArray[np.int8],
    iterations: NDArray[np.int64],
    kkt_residual: NDArray[np.float64],
    scaled_residual: NDArray[np.float64],
    threads: int,
) -> None: ...
def qmatmul(
    x: NDArray[np.float32] | NDArray[np.uint16],
    x_dtype: str,
    packed: NDArray[np.int32],
    bits: int,
    scales: NDArray[np.float32] | NDArray[np.uint16],
    scales_dtype: str,
    out: NDArray[np.float32] | NDArray[np.uint16],
    out_dtype: str,
    threads: int,
) -> None: ...
def runnable_isas() -> list[str]: ...
def active_isa() -> str: ...
def use_isa(name: str) -> None: ...
