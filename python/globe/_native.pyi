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
def runnable_isas() -> list[str]: ...
def active_isa() -> str: ...
def use_isa(name: str) -> None: ...
