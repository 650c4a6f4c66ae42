"""Every contract of a kernel is tested on all of its implementations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from globe import _native
from globe.kernels import available

PATHS = [*(f"native-{isa}" for isa in available()["isas"]), "numba", "reference"]


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield a name for `backend=`; the native kernels are switched to each instruction set in turn."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    before = _native.active_isa()
    _native.use_isa(isa)
    yield name
    _native.use_isa(before)
