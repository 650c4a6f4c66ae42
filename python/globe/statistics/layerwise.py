"""Run a checkpoint's decoder with one layer's weights in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from globe.checkpoint.formats.encoded import Encoded
from globe.checkpoint.index import Checkpoint
from globe.checkpoint.layouts import PREFIXES
from globe.checkpoint.pretrained import first_line, import_transformers, quiet, refuse_own_code, text_class
from globe.checkpoint.read_ahead import read_soon
from globe.checkpoint.tensorfile import TensorInfo, read_tensor
from globe.compute import ranks
from globe.compute.gemm import solver_dtype
from globe.errors import GlobeError
from globe.statistics.handed import HANDED, Arguments, Calls, named, shared

_HEAD = "head"  # what is neither in a layer nor beside the layers
LAYER = re.compile(rf"(?P<prefix>{'|'.join(map(re.escape, PREFIXES))})layers\.(?P<layer>\d+)\.")
TOKENS_AT_ONCE = 4096


class NotFinite(GlobeError):
    """Weights that make values that are not finite, in a compute type that is not to blame."""


@contextmanager
def own_code(checkpoint: Checkpoint) -> Iterator[None]:
    """Tell of an error of the model's own code in one line.

    Raises
    ------
    GlobeError
        In place of whatever is raised.
    """
    try:
        yield
    except GlobeError:
        raise
    except Exception as error:  # its type may be anything
        if ranks.is_loss(error):
            raise
        refuse_own_code(checkpoint.directory, error)
        raise _cannot(checkpoint, first_line(error)) from error


def require_runnable(checkpoint: Checkpoint) -> None:
    """Refuse tensors that are stored as codes of no format that is read."""
    if not checkpoint.decoded:
        raise _cannot(checkpoint, "its weight files have no tensors")


def _cannot(checkpoint: Checkpoint, why: str) -> GlobeError:
    return GlobeError(f"{checkpoint.directory}: transformers cannot run it: {why}")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint that transformers' loader reads, or decodes, when it indexes it."""

    info: TensorInfo | Encoded

    def __getitem__(self, _: Any) -> torch.Tensor:
        if isinstance(self.info, Encoded):
            return self.info.read().mT if self.info.turned else self.info.read()
        return read_tensor(self.info)


class Layerwise:
    """A causal language model of transformers: its modules without weights, and the means to load a layer's.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model's files.
    device : torch.device
        Where layers run: on a CPU in float32, elsewhere in the dtype of the checkpoint's experts.
    trust_remote_code : bool
        Run Python code that the checkpoint brings with it.
    precision : str
        With ``auto`` layers run on a CPU in bf16 too, where `working_dtype` says so.

    Raises
    ------
    GlobeError
        If transformers is not there, does not have the architecture, or misses tensors; or tensors are stored as codes
        of no format that is read.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, trust_remote_code: bool = False, precision: str = "fp32"
    ) -> None:
        require_runnable(checkpoint)
        self.checkpoint, self.device = checkpoint, device
        transformers = import_transformers("calibration")
        stored = checkpoint.leading.dtype
        self.dtype = self.working_dtype(stored, device, precision)
        import_module("transformers.modeling_utils")  # before "meta": on torch 2.6 its imports make tensors
        with own_code(checkpoint), quiet(transformers), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(
                checkpoint.directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            auto = text_class(transformers, config)
            if type(config) in transformers.AutoModelForImageTextToText._model_mapping:  # its language model runs
                auto = transformers.AutoModelForImageTextToText
            made = auto.from_config(config, dtype=self.dtype, trust_remote_code=trust_remote_code)
            self.model = getattr(made, "thinker", made).eval()  # of qwen3_omni_moe, which has no decoder of its own
            self.base = self.model.get_decoder()
            if not hasattr(self.base, "layers"):  # of several models some give their language model with its head
                self.base = self.base.model
            self.layers = self.base.layers
            self._require_one_stream()
        self.positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._expert_dtype = stored
        self._names: dict[int | str | None, list[str]] = {}
        matches = {name: LAYER.match(name) for name in checkpoint.decoded}
        prefix = next((match["prefix"] for match in matches.values() if match is not None), "model.")
        for name, match in matches.items():
            beside = _HEAD if name.startswith("lm_head.") or not name.startswith(prefix) else None
            self._names.setdefault(int(match["layer"]) if match is not None else beside, []).append(name)

    def _require_one_stream(self) -> None:
        """Refuse a decoder that is given more than a text."""
        given = signature(self.base.forward).parameters.values()
        needed = [each.name for each in given if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
        if needed and needed != ["input_ids"]:
            raise GlobeError(
                f"{self.checkpoint.directory}: {type(self.base).__name__} of transformers is given {needed[0]} beside "
                "the text; calibration lets a text through alone: use --calibrate none"
            )

    @staticmethod
    def working_dtype(stored: torch.dtype, device: torch.device, precision: str) -> torch.dtype:
        """The dtype that layers of a checkpoint in the dtype `stored` run in.

        On a CPU fp32; with precision ``auto`` bf16, where the checkpoint is in bf16 and the CPU has bf16 dot products.
        """
        if device.type != "cpu":
            return stored
        fast = solver_dtype(precision, device) == torch.bfloat16
        return torch.bfloat16 if fast and stored == torch.bfloat16 else torch.float32

    def expect(self, number: int) -> None:
        """Let the system read a layer's weights into its cache meanwhile."""
        found: list[TensorInfo] = []
        for name in self._names.get(number, []):
            info = self.checkpoint.decoded[name]
            found += [part.info for part in info.parts.values()] if isinstance(info, Encoded) else [info]
        read_soon(found)

    def experts(self, number: int) -> Any:
        """The module of a layer that holds its routed experts, or None."""
        for module in self.layers[number].modules():
            down = module._parameters.get("down_proj")
            if down is not None and down.dim() == 3 and module._parameters.keys() & {"gate_up_proj", "up_proj"}:
                return module
        return None

    def embed(self, windows: torch.Tensor) -> tuple[torch.Tensor, Arguments]:
        """The stream that the first layer is given, and the other arguments of any layer.

        The decoder's own forward makes them, with layers that only note what they are called with. Where layers give
        something beside the stream, they give a mark, by which the next ones' argument of it is known.

        Returns
        -------
        tuple
            The stream (n, window, …, d) on the CPU, and arguments by a layer's number and a batch of windows.
        """
        stream: torch.Tensor | None = None
        seen: dict[int, Calls] = {}
        calls: Calls = []
        hands_on = False

        def noting(function: Any) -> Any:
            def note(hidden_states: torch.Tensor, *rest: Any, **arguments: Any) -> Any:
                nonlocal stream
                if stream is None:
                    stream = torch.empty(len(windows), *hidden_states.shape[1:], dtype=hidden_states.dtype)
                if not calls:
                    stream[span] = hidden_states.cpu()
                calls.append(named(function, rest) | arguments)
                return (hidden_states, HANDED) if hands_on else hidden_states

            return note

        def noted(span: slice) -> None:
            with torch.no_grad():
                self.base(input_ids=windows[span].to(self.device), use_cache=False)

        with self._loaded(None, self.base, set(self.layers)):
            for layer in self.layers:
                layer.forward = noting(layer.forward)
            try:
                for span in self.batches(windows):
                    calls = []
                    with own_code(self.checkpoint):
                        try:
                            noted(span)
                        except ValueError as error:
                            if hands_on or "to unpack" not in str(error):
                                raise
                            hands_on, calls = True, []
                            noted(span)
                    before = seen.get(0, calls)
                    seen[span.start] = [shared(*pair) for pair in zip(calls, before, strict=True)]
            finally:
                for layer in self.layers:
                    del layer.forward
        assert stream is not None
        return stream, Arguments(seen)

    @staticmethod
    def batches(windows: torch.Tensor) -> list[slice]:
        """Batches of windows, of about 4,096 tokens each."""
        size = max(1, TOKENS_AT_ONCE // windows.shape[1])
        return [slice(first, min(first + size, len(windows))) for first in range(0, len(windows), size)]

    @contextmanager
    def layer(self, number: int) -> Iterator[Any]:
        """A decoder layer with its weights, for as long as the scope lasts."""
        experts = self.experts(number)
        if experts is not None:  # stacked as stored: that takes half the memory of stacking them in float32
            experts.to(self._expert_dtype)
        with self._loaded(number, self.layers[number], set()) as layer:
            if experts is not None:
                experts.to(self.dtype)
            yield layer

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all its weights, its output layer among them, for as long as the scope lasts."""
        with ExitStack() as held:
            held.enter_context(self.ends())
            for number in range(len(self.layers)):
                held.enter_context(self.layer(number))
            yield self.model

    @contextmanager
    def on_demand(self) -> Iterator[Any]:
        """The model with what lies before and behind its layers; each of these has its weights while it runs."""

        def loading(number: int, layer: Any) -> Any:
            forward = layer.forward

            def run(*given: Any, **arguments: Any) -> Any:
                self.expect((number + 1) % len(self.layers))
                with self.layer(number):
                    return forward(*given, **arguments)

            return run

        with self.ends():
            for number, layer in enumerate(self.layers):
                layer.forward = loading(number, layer)
            try:
                yield self.model
            finally:
                for layer in self.layers:
                    del layer.forward

    @contextmanager
    def ends(self) -> Iterator[Any]:
        """The model with what lies before and behind its layers, for as long as the scope lasts."""
        beside = set(self.base.modules())
        head = self.model.get_output_embeddings()
        tied = head is not None and not any(name.startswith("lm_head.") for name in self._names.get(_HEAD, []))
        with self._loaded(None, self.base, set(self.layers)):
            if tied:
                beside.add(head)
                head.weight = self.model.get_input_embeddings().weight
            try:
                with self._loaded(_HEAD, self.model, beside):
                    yield self.model
            finally:
                if tied:
                    _to_meta(head)

    def run(self, number: int, layer: Any, stream: torch.Tensor, arguments: Arguments, span: slice) -> torch.Tensor:
        """A layer's output on the CPU for a batch of a stream (n, window, …, d)."""
        given = arguments.of(number, span)
        places = {name: len(value) for name, value in given.items() if isinstance(value, dict)}
        with torch.no_grad(), own_code(self.checkpoint):
            output = layer(stream[span].to(self.device), **given)
            result: torch.Tensor = (output[0] if isinstance(output, tuple) else output).cpu()
        if isinstance(output, tuple) and len(output) > 1:
            arguments.hand_on(number, span, output[1])
        for name, count in places.items():
            if len(given[name]) > count:  # keys and values, of which no second stream may know
                raise _cannot(self.checkpoint, f"layer {number} leaves something for later ones in {name}")
        if not all(map(torch.isfinite, result.aminmax())):
            kind = NotFinite if self.device.type == "cpu" else GlobeError
            raise kind(
                f"{self.checkpoint.directory}: layer {number} gives values that are not finite; its weights or its "
                "compute type are damaged: calibrate on the CPU, or fetch the checkpoint again"
            )
        return result

    @contextmanager
    def _loaded(self, key: int | str | None, root: Any, without: set[Any]) -> Iterator[Any]:
        mine = list(_modules(root, without))
        self._load(key, mine)
        try:
            yield root
        finally:
            for module in mine:
                _to_meta(module)

    def _load(self, key: int | str | None, modules: list[Any]) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import convert_and_load_state_dict_in_model
            from transformers.modeling_utils import LoadStateDictConfig
        except ImportError as error:
            raise GlobeError(f"calibration needs transformers 5.15 or newer: {first_line(error)}") from error
        import transformers

        stored = {name: _Stored(self.checkpoint.decoded[name]) for name in self._names.get(key, [])}
        with own_code(self.checkpoint), quiet(transformers):
            plan = self.model._get_dtype_plan(self.dtype) if hasattr(self.model, "_get_dtype_plan") else {}
            where = LoadStateDictConfig(
                device_map={"": self.device},
                dtype=self.dtype,
                dtype_plan=plan,
                weight_mapping=get_model_conversion_mapping(self.model),
            )
            found, _ = convert_and_load_state_dict_in_model(self.model, stored, where)
        for trouble in [*found.conversion_errors.values(), *found.error_msgs]:
            raise _cannot(self.checkpoint, first_line(RuntimeError(trouble)))
        for name, has, wanted in found.mismatched_keys:
            raise _cannot(self.checkpoint, f"tensor {name} has shape {list(has)}, config.json asks for {list(wanted)}")
        for module in modules:
            with own_code(self.checkpoint):
                self._fill_buffers(module)
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None and value.is_meta:
                    raise _cannot(
                        self.checkpoint, f"a weight file lacks {name} of {type(module).__name__} (layer {key})"
                    )

    def _fill_buffers(self, module: Any) -> None:
        """Compute the buffers that no checkpoint holds, as transformers does after loading."""
        names = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        if any(module._buffers[name].is_meta for name in names):
            for name in names:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
            with torch.no_grad():
                self.model._init_weights(module)


def _modules(root: Any, without: set[Any]) -> Iterator[Any]:
    if root not in without:
        yield root
        for child in root.children():
            yield from _modules(child, without)


def _to_meta(module: Any) -> None:
    for name, value in module._parameters.items():
        if value is not None:
            module._parameters[name] = torch.nn.Parameter(value.detach().to("meta"), requires_grad=False)
    for name, value in module._buffers.items():
        if value is not None:
            module._buffers[name] = value.to("meta")
