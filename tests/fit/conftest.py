"""What tests of the joint fit's steps share."""

from __future__ import annotations

import pytest

from dense import small_family
from globe.checkpoint.family import Family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small_family(tmp_path_factory.mktemp("newton"))
