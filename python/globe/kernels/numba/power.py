"""Powers of arrays inside Numba functions: 2^(p log2 u), by the polynomials of cpp/src/simd/power.hpp."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

# log2((1 + s) / (1 - s)) / s as a polynomial in s², and 2^r for |r| <= 1/2.
_LOG2 = {
    "float32": (2.88539008, 0.961798839, 0.576715186, 0.431717697),
    "float64": (
        *(2.8853900817779268115, 0.96179669392598972877, 0.5770780163455202295, 0.41219858584090053448),
        *(0.32059853491395986095, 0.26233435250418301904, 0.22091308423117679618, 0.21365895694319269427),
    ),
}
_EXP2 = {
    "float32": (1.0, 0.693147207, 0.240226509, 0.0555032723, 0.00961805668, 0.00134004282, 0.000154614447),
    "float64": (
        *(1.0, 0.69314718055994530925, 0.24022650695910159567, 0.055504108664821627039),
        *(0.0096181291075872566681, 0.0013333558146406470697, 0.00015403530463724354209),
        *(0.000015252733841556772589, 1.3215432535912376166e-6, 1.0178057087733941105e-7),
        *(7.0741942972885210056e-9, 4.455817908336064493e-10),
    ),
}

WORK = 5  # rows of scratch that `power` needs


class Format(NamedTuple):
    """A floating-point type: polynomials and bits, as numbers of that type and of its words."""

    log2: tuple[Any, ...]
    exp2: tuple[Any, ...]
    zero: Any
    one: Any
    two: Any
    bias: Any  # 2^(bits of the mantissa), which is `large`, + the bias of the exponent
    shifter: Any  # its sum with t ends in round(t)
    lowest: Any  # exponent of the least normal number
    least: Any  # the least normal number
    lift: Any  # 2^lifted, by which smaller ones become normal
    lifted: Any
    shift: Any  # bits of the mantissa
    mantissa: Any  # its mask
    low: Any  # bits of √½
    offset: Any  # bits of 1 less those of √½
    large: Any  # bits of large


def _format(dtype: Any, words: Any, mantissa: int, bias: int) -> Format:
    def bits(value: float) -> int:
        return int(np.array(value, dtype).view(words))

    low, large = bits(np.sqrt(0.5)), 2.0**mantissa
    reals = (0.0, 1.0, 2.0, large + bias, 1.5 * large, 1.0 - bias, 2.0 ** (1 - bias), 2.0 * large, mantissa + 1.0)
    integers = (mantissa, (1 << mantissa) - 1, low, bits(1.0) - low, bits(large))
    name = np.dtype(dtype).name
    return Format(
        tuple(map(dtype, _LOG2[name])), tuple(map(dtype, _EXP2[name])), *map(dtype, reals), *map(words, integers)
    )


FORMATS = {
    np.dtype(np.float32): _format(np.float32, np.uint32, 23, 127),
    np.dtype(np.float64): _format(np.float64, np.uint64, 52, 1023),
}
WORDS = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}


# A function that does not say takes the licences of fastmath from its caller, and rounding would be simplified away.
@njit(nogil=True, cache=True, error_model="numpy", fastmath=False)
def power(p, less, size, out, work, words, fmt):  # type: ignore[no-untyped-def]
    """out = u^p where u > 0, else 0, for the first `size` entries.

    u is work[0], and less is u - 1 with the digits that u near 1 lost. words are the bits of work, which has
    WORK rows.
    """
    u, exponent, mantissa, t, shifted = 0, 1, 2, 3, 4
    for i in range(size):
        work[t, i] = work[u, i] if work[u, i] >= fmt.least else work[u, i] * fmt.lift
    # u = m 2^e with m in [√½, √2)
    for i in range(size):
        moved = words[t, i] + fmt.offset
        words[exponent, i] = (moved >> fmt.shift) | fmt.large
        words[mantissa, i] = (moved & fmt.mantissa) + fmt.low
    for i in range(size):
        e = work[exponent, i] - (fmt.bias if work[u, i] >= fmt.least else fmt.bias + fmt.lifted)
        f = less[i] if e == fmt.zero else work[mantissa, i] - fmt.one
        s = f / (f + fmt.two)
        work[t, i] = p * (s * _polynomial(fmt.log2, s * s) + e)
    for i in range(size):
        work[shifted, i] = work[t, i] + fmt.shifter
        rest = work[t, i] - (work[shifted, i] - fmt.shifter)
        work[mantissa, i] = _polynomial(fmt.exp2, rest)
    for i in range(size):
        words[exponent, i] = words[mantissa, i] + (words[shifted, i] << fmt.shift)
    for i in range(size):
        normal = (work[u, i] > fmt.zero) & (work[t, i] > fmt.lowest)
        out[i] = work[exponent, i] if normal else fmt.zero


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _polynomial(coefficients, x):  # type: ignore[no-untyped-def]
    value = coefficients[-1]
    for i in range(len(coefficients) - 2, -1, -1):
        value = value * x + coefficients[i]
    return value
