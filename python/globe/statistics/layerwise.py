"""Run a checkpoint's decoder with one layer's weights in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from globe.checkpoint.index import Checkpoint
from globe.checkpoint.layouts import PREFIXES
from globe.checkpoint.pretrained import first_line, import_transformers, quiet, refuse_own_code
from globe.checkpoint.quantised import KEY, require_plain
from globe.checkpoint.read_ahead import read_soon
from globe.checkpoint.tensorfile import TensorInfo, read_tensor
from globe.compute.gemm import dictionary_dtype
from globe.errors import GlobeError

_HEAD = "head"  # what is neither in a layer nor beside the layers
LAYER = re.compile(rf"(?P<prefix>{'|'.join(map(re.escape, PREFIXES))})layers\.(?P<layer>\d+)\.")
TOKENS_AT_ONCE = 4096

Arguments = Callable[[int, slice], dict[str, Any]]


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
        refuse_own_code(checkpoint.directory, error)
        raise _cannot(checkpoint, first_line(error)) from error


def require_runnable(checkpoint: Checkpoint) -> None:
    """Refuse tensors beside the experts that are quantised: here they would run as plain numbers."""
    dtypes = (info.dtype for info in checkpoint.tensors.values())
    require_plain(checkpoint.directory, dtypes, checkpoint.config.get(KEY))


def _cannot(checkpoint: Checkpoint, why: str) -> GlobeError:
    return GlobeError(f"{checkpoint.directory}: transformers cannot run it: {why}")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint that transformers' loader reads when it indexes it."""

    info: TensorInfo

    def __getitem__(self, _: Any) -> torch.Tensor:
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
        If transformers is not there, does not have the architecture, or misses tensors; or tensors are quantised.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, trust_remote_code: bool = False, precision: str = "fp32"
    ) -> None:
        require_runnable(checkpoint)
        self.checkpoint, self.device = checkpoint, device
        transformers = import_transformers("calibration")
        stored = checkpoint.family("gate").dtype
        self.dtype = self.working_dtype(stored, device, precision)
        import_module("transformers.modeling_utils")  # before "meta": on torch 2.6 its imports make tensors
        with own_code(checkpoint), quiet(transformers), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(
                checkpoint.directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            auto = transformers.AutoModelForCausalLM
            if type(config) in transformers.AutoModelForImageTextToText._model_mapping:  # its language model runs
                auto = transformers.AutoModelForImageTextToText
            made = auto.from_config(config, dtype=self.dtype, trust_remote_code=trust_remote_code)
            self.model = made.eval()
            self.base = self.model.get_decoder()
            self.layers = self.base.layers
        self.positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._expert_dtype = stored
        self._names: dict[int | str | None, list[str]] = {}
        matches = {name: LAYER.match(name) for name in checkpoint.tensors}
        prefix = next((match["prefix"] for match in matches.values() if match is not None), "model.")
        for name, match in matches.items():
            beside = _HEAD if name.startswith("lm_head.") or not name.startswith(prefix) else None
            self._names.setdefault(int(match["layer"]) if match is not None else beside, []).append(name)

    @staticmethod
    def working_dtype(stored: torch.dtype, device: torch.device, precision: str) -> torch.dtype:
        """The dtype that layers of a checkpoint in the dtype `stored` run in.

        On a CPU fp32; with precision ``auto`` bf16, where the checkpoint is in bf16 and the CPU has bf16 dot products.
        """
        if device.type != "cpu":
            return stored
        fast = dictionary_dtype(precision, device) == torch.bfloat16
        return torch.bfloat16 if fast and stored == torch.bfloat16 else torch.float32

    def expect(self, number: int) -> None:
        """Let the system read a layer's weights into its cache meanwhile."""
        read_soon([self.checkpoint.tensors[name] for name in self._names.get(number, [])])

    def experts(self, number: int) -> Any:
        """The module of a layer that holds its routed experts, or None."""
        found = [module for module in self.layers[number].modules() if "gate_up_proj" in module._parameters]
        return found[0] if found and found[0].gate_up_proj.dim() == 3 else None

    def embed(self, windows: torch.Tensor) -> tuple[torch.Tensor, Arguments]:
        """The hidden states that the first layer is given, and the other arguments of any layer.

        The decoder's own forward makes them, with layers that only note what they are called with.

        Returns
        -------
        tuple
            Hidden states (n, window, d) on the CPU, and a function of a layer's number and a batch of windows.
        """
        hidden = torch.empty(*windows.shape, self.base.config.hidden_size, dtype=self.dtype)
        seen: dict[int, list[dict[str, Any]]] = {}
        calls: list[dict[str, Any]] = []

        def note(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            if not calls:
                hidden[span] = hidden_states.cpu()
            calls.append(arguments)
            return hidden_states

        with self._loaded(None, self.base, set(self.layers)):
            for layer in self.layers:
                layer.forward = note
            try:
                for span in self.batches(windows):
                    calls = []
                    with torch.no_grad(), own_code(self.checkpoint):
                        self.base(input_ids=windows[span].to(self.device), use_cache=False)
                    seen[span.stop - span.start] = calls
            finally:
                for layer in self.layers:
                    del layer.forward
        return hidden, lambda number, span: seen[span.stop - span.start][number]

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

    def run(self, number: int, layer: Any, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """A layer's output on the CPU for a batch of hidden states (n, window, d)."""
        with torch.no_grad(), own_code(self.checkpoint):
            output = layer(hidden.to(self.device), **arguments)
            result: torch.Tensor = (output[0] if isinstance(output, tuple) else output).cpu()
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

        stored = {name: _Stored(self.checkpoint.tensors[name]) for name in self._names.get(key, [])}
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
