"""Fisher information, layer by layer, against gradients of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import calibrate_tiny, make_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.errors import GlobeError  # noqa: E402
from globe.runs.stages import Stages  # noqa: E402
from globe.statistics import fisher as module  # noqa: E402
from globe.statistics.fisher import fisher, spread  # noqa: E402
from globe.statistics.layerwise import Layerwise  # noqa: E402

CPU = torch.device("cpu")


def _likeliest(q: Any, count: int, generator: Any) -> Any:
    """In place of a draw: the model's likeliest token, which an oracle finds too."""
    return q.argmax(-1, keepdim=True)


def _oracle(directory: Path, parts: list[Any]) -> dict[int, Any]:
    """Squares of the gradients of products, and products of those of outputs, of the whole model's own modules."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )
    found: dict[int, Any] = {}
    with _watched(model) as calls:
        for ids in parts:
            calls.clear()
            states = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=states, use_cache=False).logits
            (-logits.log_softmax(-1).max(-1).values.sum()).backward()
            for number, (products, output) in enumerate(calls):
                squares = [
                    torch.stack([half.square().sum(0) for half in value.grad.double().chunk(2, -1)])
                    if value is not None and value.grad is not None
                    else torch.zeros(2, width, dtype=torch.float64)
                    for value, width in products
                ]
                gradient = output.grad.double()
                sums = (torch.stack(squares), gradient.mT @ gradient)
                found[number] = [a + b for a, b in zip(found[number], sums, strict=True)] if number in found else sums
    return found


@contextmanager
def _watched(model: Any) -> Iterator[list[Any]]:
    """Experts one after another in plain products, whose gradients stay."""
    calls: list[Any] = []

    def forward_of_copies(self: Any, copied: Any) -> Any:
        answers, products = [], []
        for expert, x in enumerate(copied.view(len(self.down_proj), -1, copied.shape[-1])):
            both = x @ self.gate_up_proj[expert]
            both.retain_grad()
            gate, up = both.chunk(2, -1)
            answers.append((self.act_fn(gate) * up) @ self.down_proj[expert])
            products.append((both, both.shape[-1] // 2))
        answers[0].retain_grad()  # of which every expert's are added up
        calls.append((products, answers[0]))
        return torch.cat(answers)

    def forward(self: Any, x: Any, *routing: Any) -> Any:
        if not routing:
            return forward_of_copies(self, x)
        chosen, weights = routing
        output, products = torch.zeros_like(x), []
        for expert in range(len(self.down_proj)):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            both = x[rows] @ self.gate_up_proj[expert].mT
            both.retain_grad()
            gate, up = both.chunk(2, -1)
            answer = (self.act_fn(gate) * up) @ self.down_proj[expert].mT
            output = output.index_add(0, rows, answer * weights[rows, place, None])
            products.append((both, both.shape[-1] // 2))
        output.retain_grad()
        calls.append((products, output))
        return output

    experts = [each for each in model.modules() if "gate_up_proj" in each._parameters]
    for each in experts:
        each.forward = forward.__get__(each)
    yield calls


@pytest.mark.parametrize("layout", ["olmoe", "qwen3_moe", "llama4_text"])
def test_it_is_that_of_the_whole_model(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny(layout, tmp_path / "model", dtype="float32")
    vocabulary = Checkpoint(directory).text_config["vocab_size"]
    draw = torch.Generator().manual_seed(1)
    parts = [torch.randint(vocabulary, shape, generator=draw) for shape in ((3, 16), (2, 24))]
    monkeypatch.setattr(torch, "multinomial", _likeliest)
    backwards, loaded = module._Path.backwards, []

    def spy(self: Any, number: int, layer: Any) -> None:
        layers = self._streamed.layers
        loaded.append([n for n, each in enumerate(layers) if any(not part.is_meta for part in each.parameters())])
        assert loaded[-1] == [number]
        backwards(self, number, layer)

    monkeypatch.setattr(module._Path, "backwards", spy)
    found = fisher(Layerwise(Checkpoint(directory), CPU), parts, tmp_path, Stages())
    tokens = sum(part.numel() for part in parts)
    expected = _oracle(directory, parts)
    assert loaded
    assert len(found) == len(expected) > 1
    for (_, mine), number in zip(sorted(found.items()), expected, strict=True):
        squares, output = (value / tokens for value in expected[number])
        for value, wanted in ((mine.gate, squares[:, 0]), (mine.up, squares[:, 1]), (mine.output, output)):
            assert float(wanted.abs().max()) > 0
            torch.testing.assert_close(value.double(), wanted, rtol=2e-3, atol=1e-4 * float(wanted.abs().max()))
        assert int(mine.counts.sum()) % tokens == 0
    assert list(tmp_path.iterdir()) == [directory]  # the inputs of the layers leave no file


def test_windows_are_taken_evenly() -> None:
    parts = [torch.arange(12)[:, None].expand(12, 4), torch.arange(3)[:, None].expand(3, 8)]
    some = spread(parts, 24)
    assert [part[:, 0].tolist() for part in some] == [[1, 4, 7, 10], [1]]
    assert all(torch.equal(a, b) for a, b in zip(spread(parts, 1000), parts, strict=True))


def test_a_calibration_without_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, lines = make_tiny("olmoe", tmp_path / "model"), Lines()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(GlobeError, match=r"0\.00 GB free, the inputs of all layers need"):
        fisher(Layerwise(Checkpoint(directory), CPU), [torch.zeros(2, 8, dtype=torch.int64)], tmp_path, Stages())
    found = calibrate_tiny(directory, tmp_path / "file", progress=lines)
    assert found.about["fisher"]["tokens"] == 0 and "GB free" in found.about["fisher"]["none"]
    assert any(
        "errors are weighed beside the residual stream, without Fisher information" in line for line in lines.lines
    )
    assert found.layer(0).gate_fisher is None
    monkeypatch.undo()
    found = calibrate_tiny(directory, tmp_path / "file")
    assert found.about["fisher"]["none"] is None and found.layer(0).gate_fisher is not None
    unasked = calibrate_tiny(directory, tmp_path / "file", fisher=False)
    assert unasked.about["fisher"] == {"tokens": 0, "none": "not asked for"}
    assert unasked.layer(0).gate_fisher is None
