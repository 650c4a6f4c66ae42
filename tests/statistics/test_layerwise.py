"""Layer by layer a model's stream is that of the model: whatever layers are called with and hand one another."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from architectures import tiny_model  # noqa: E402
from globe.checkpoint.index import Checkpoint  # noqa: E402
from globe.statistics import layerwise  # noqa: E402
from globe.statistics.layerwise import Layerwise  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", ["mixtral", "glm_moe_dsa", "zaya", "gemma4", "gpt_oss", "deepseek_v4"])
def test_the_stream_is_the_models(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(model_type).float()
    model.save_pretrained(tmp_path)
    windows = torch.randint(3, 250, (6, 16), generator=torch.Generator().manual_seed(0))
    seen: dict[int, torch.Tensor] = {}
    layers = model.get_decoder().layers

    def keep(number: int, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, torch.Tensor)
        seen[number] = first

    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, __, output, number=number: keep(number, output))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    monkeypatch.setattr(layerwise, "TOKENS_AT_ONCE", 32)  # three batches, whose arguments are not all the same
    streamed = Layerwise(Checkpoint(tmp_path), CPU)
    stream, arguments = streamed.embed(windows)
    for number in range(len(layers)):
        with streamed.layer(number) as layer:
            for span in streamed.batches(windows):
                stream[span] = streamed.run(number, layer, stream, arguments, span)
        # Buffers that no file holds are made anew in fp32 there, and were rounded to bf16 here.
        assert torch.allclose(stream, seen[number], rtol=1e-3, atol=1e-3 * float(stream.abs().max())), number
