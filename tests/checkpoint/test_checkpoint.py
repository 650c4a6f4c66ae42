"""Expert matrices as they are read: down comes transposed, in every layout, by any rows and into any memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from checkpoints import make_tiny  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.checkpoint.layouts import FAMILIES  # noqa: E402
from globe.seeds.proxies import proxy_blocks, row_spans  # noqa: E402


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["olmoe", "granitemoe"])
def test_every_family_by_rows(layout: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_tiny(layout, tmp_path / "source", dtype=dtype))
    stored = load_file(tmp_path / "source" / "model.safetensors")
    for name in FAMILIES:
        family = checkpoint.family(name)
        number = len(family) - 1
        expert = family.experts[number]
        tensor = stored[expert.tensor] if expert.index is None else stored[expert.tensor][expert.index]
        half = tensor[family.p if name == "up" else 0 :][: family.p] if expert.index is not None else tensor
        wanted = tensor.T if name == "down" else half
        assert expert.transposed == (name == "down")
        assert wanted.shape == (family.p, family.d)
        for rows in (None, (0, family.p), (3, 17), (family.p - 1, family.p), (5, 5)):
            first, last = rows or (0, family.p)
            found = family.read(number, rows)
            assert found.is_contiguous() and torch.equal(found, wanted[first:last])
            room = torch.full((2, last - first, family.d), 7, dtype=family.dtype)
            assert family.read(number, rows, room[1]).data_ptr() == room[1].data_ptr()
            assert torch.equal(room[1], wanted[first:last]) and bool((room[0] == 7).all())


def test_proxies_of_down_are_columns(tmp_path: Path) -> None:
    family = Checkpoint(make_tiny("olmoe", tmp_path / "source")).family("down")
    rows = np.array([1, 2, 8, 30])
    spans = row_spans(len(family), len(rows), family.d, 2 * 8 * len(family) * family.d)
    blocks = list(proxy_blocks(family, rows, torch.device("cpu"), spans))
    assert [span for span, _ in blocks] == [slice(0, 2), slice(2, 4)]
    found = torch.cat([block.view(len(family), -1, family.d) for _, block in blocks], 1)
    wanted = torch.stack([family.read(number)[rows] for number in range(len(family))])
    assert torch.equal(found, wanted)
