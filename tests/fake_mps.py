"""An MPS device without a Mac: tensors that say they are on it, hold their data on the CPU, and record what is done.

Every operation on such a tensor is looked up in torch's own table of kernels (torchgen's native_functions.yaml); one
that has no kernel for MPS, or takes tensors of the CPU too, and a float64 there are errors, as they are on a Mac.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps", 0)
MAY_MIX = {"copy_", "index.Tensor", "index_put_", "_index_put_impl_"}  # indices may lie on the CPU


@functools.cache
def kernels_of_mps() -> dict[str, bool]:
    """Every operator ("name.overload") and whether it runs on MPS: natively, or made of others."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = {}
    for entry in yaml.load(text, yaml.CSafeLoader):
        table[entry["func"].partition("(")[0]] = entry

    def runs(entry: dict[str, Any]) -> bool:
        if "structured_delegate" in entry:
            return runs(table[entry["structured_delegate"]])
        keys = ",".join(entry.get("dispatch", ["CompositeImplicitAutograd"])).replace(" ", "").split(",")
        return any(key == "MPS" or key.startswith("Composite") for key in keys)

    return {name: runs(entry) for name, entry in table.items()}


class OnMps(torch.Tensor):
    """A tensor on the device that is not there."""

    data_here: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> OnMps:
        if data.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"MPS has no {data.dtype}")
        made: OnMps = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), dtype=data.dtype, device=data.device
        )
        made.data_here = data
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """What Python sees; below it no device is looked for."""
        return MPS

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        """A copy on the CPU."""
        return self.data_here.clone()

    def to(self, target: torch.device | torch.dtype) -> torch.Tensor:  # type: ignore[override]
        """On another device or of another dtype."""
        if isinstance(target, torch.device):
            return self if target.type == "mps" else self.cpu()
        return super().to(target)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnMps({self.data_here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class FakeMps(TorchDispatchMode):
    """While it is active, tensors can be made on MPS and moved to it; `seen` are the operators that ran there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if on_device(args, kwargs):
            self.seen.add(name_of(func))
        return run(func, args, kwargs)


def name_of(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::") + ("." + func._overloadname).replace(".default", "")


def on_device(args: Any, kwargs: Any) -> bool:
    leaves = tree_flatten((args, kwargs))[0]
    return any(isinstance(leaf, OnMps) or (isinstance(leaf, torch.device) and leaf.type == "mps") for leaf in leaves)


def mixes_devices(args: Any, kwargs: Any) -> bool:
    """Whether tensors there and here meet; one value without a dimension may be here."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    there = [isinstance(tensor, OnMps) for tensor in tensors]
    return any(there) and any(not on and tensor.dim() > 0 for on, tensor in zip(there, tensors, strict=True))


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Apply the operator to the data here; results are on the device if an argument is, or where they are asked for."""
    there = on_device(args, kwargs)
    name = name_of(func)
    if there:
        assert kernels_of_mps().get(name, False), f"{name} has no MPS kernel"
        assert name in MAY_MIX or not mixes_devices(args, kwargs), f"{name} mixes tensors of MPS and of the CPU"
    asked = kwargs.get("device")
    if asked is not None:
        there = asked.type == "mps"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "_to_copy":
        there = isinstance(args[0], OnMps)
    if name in ("_local_scalar_dense", "equal", "is_nonzero"):
        there = False
    here_args, here_kwargs = tree_map(lambda x: x.data_here if isinstance(x, OnMps) else x, (args, kwargs))
    result = func(*here_args, **here_kwargs)
    if func._schema.is_mutable:  # what was written to is what is returned
        return args[0] if name.partition(".")[0].endswith("_") else kwargs.get("out", result)
    return tree_map(lambda x: OnMps(x) if there and isinstance(x, torch.Tensor) else x, result)
