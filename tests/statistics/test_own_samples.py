"""Samples of a model itself: drawn from its own distribution, by a seed, with a cache that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import VOCABULARY, byte_tokenizer  # noqa: E402
from displays import Lines  # noqa: E402
from families import silent  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from globe.runs.stages import Silent, Stages  # noqa: E402
from globe.statistics import own  # noqa: E402
from globe.statistics.layerwise import Layerwise  # noqa: E402
from globe.statistics.own import Wanted, own_samples, start_tokens  # noqa: E402

PLENTY = 1 << 40
# full attention alone; linear attention; latent attention; a dense first layer
ARCHITECTURES = ("mixtral", "qwen3_5_moe", "deepseek_v2", "glm4_moe", "granitemoe", "phimoe")


def sample(model: Path, wanted: Wanted, display: Any = None) -> Any:
    streamed = Layerwise(Checkpoint(model), torch.device("cpu"))
    found = own_samples(streamed, wanted, PLENTY, Stages(display or Silent()))
    assert all(part.is_meta for part in streamed.model.parameters())
    return found


@pytest.mark.parametrize("layout", ARCHITECTURES)
def test_steps_see_what_the_whole_model_sees(
    layout: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    drawn = own._drawn

    def spy(logits: Any, random: Any) -> Any:
        seen.append(logits)
        return drawn(logits, random)

    monkeypatch.setattr(own, "_drawn", spy)
    ids = sample(tiny(layout), Wanted(3, 12, torch.arange(20, 60)))
    model, _ = load_model(tiny(layout))
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].float()
    torch.testing.assert_close(torch.stack(seen, 1), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_same_for_a_seed(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = torch.arange(20, 60)
    lines = Lines()
    one = sample(tiny("mixtral"), Wanted(5, 16, starts), lines)
    assert "80 tokens sampled from the model itself in" in lines.lines[-1]
    assert one.shape == (5, 16) and bool(torch.isin(one[:, 0], starts).all())
    assert torch.equal(one, sample(tiny("mixtral"), Wanted(5, 16, starts)))
    assert not torch.equal(one, sample(tiny("mixtral"), Wanted(5, 16, starts, seed=1)))
    random = torch.Generator().manual_seed(0)
    assert torch.equal(one[:, 0], starts[torch.randint(len(starts), (5,), generator=random)])


@pytest.mark.parametrize("layout", ARCHITECTURES)
def test_from_disk_they_are_the_same_with_one_layer_in_memory(layout: str, tiny: Callable[[str], Path]) -> None:
    streamed, lines = Layerwise(Checkpoint(tiny(layout)), torch.device("cpu")), Lines()
    there: list[int] = []
    for layer in streamed.layers:
        layer.register_forward_pre_hook(
            lambda *_: there.append(sum(not part.is_meta for each in streamed.layers for part in each.parameters()))
        )
    wanted = Wanted(5, 8, torch.arange(20, 60))
    least = own.sampling_bytes(streamed.checkpoint, 2, 8, whole=False)
    found = own_samples(streamed, wanted, least, Stages(lines), from_disk=True)
    expected = own.sampled(load_model(tiny(layout))[0], wanted, silent, 2)
    assert torch.equal(found, expected) and "read again for every token" in lines.lines[-1]
    assert there and not any(there)  # before a layer runs none has weights
    assert all(part.is_meta for part in streamed.model.parameters())


def test_tokens_are_drawn_by_their_probability() -> None:
    random = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    found = own._drawn(probabilities.log().repeat(20_000, 1), random).bincount(minlength=6) / 20_000
    torch.testing.assert_close(found, probabilities, rtol=0, atol=0.02)
    assert found[[0, 2, 5]].tolist() == [0, 0, 0]


def test_where_a_sample_begins() -> None:
    tokenizer = byte_tokenizer()
    assert start_tokens(tokenizer).tolist() == list(range(256))
    tokenizer.add_special_tokens({"bos_token": "!", "eos_token": "<end>"})
    assert start_tokens(tokenizer).tolist() == sorted(set(range(256)) - {tokenizer.bos_token_id})

    class Begins:
        bos_token_id = 7

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [7]}

    assert start_tokens(Begins()).tolist() == [7]


def test_what_cannot_be_sampled(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = Layerwise(Checkpoint(tiny("mixtral")), torch.device("cpu"))
    wanted = Wanted(2, 4, torch.arange(VOCABULARY))
    with pytest.raises(GlobeError, match="own samples need the whole model in memory, about .* --calibrate pydoc"):
        own_samples(streamed, wanted, 1 << 20, Stages())
    with pytest.raises(GlobeError, match="own samples need a layer in memory, about .* --max-memory"):
        own_samples(streamed, wanted, 1 << 20, Stages(), from_disk=True)
    forward = type(streamed.model).forward

    def damaged(self: Any, **arguments: Any) -> Any:
        said = forward(self, **arguments)
        said.logits.fill_(torch.nan)
        return said

    monkeypatch.setattr(type(streamed.model), "forward", damaged)
    with pytest.raises(GlobeError, match="logits are not finite"):
        own_samples(streamed, wanted, PLENTY, Stages())
    assert all(part.is_meta for part in streamed.model.parameters())
