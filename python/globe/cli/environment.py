"""What a bug report needs: versions, instruction set, devices, processors, memory, how threads wait."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from globe import kernels
from globe._version import __version__
from globe.machine import control_groups
from globe.machine.processors import affinity, usable_processors
from globe.machine.waiting import waiting_policy
from globe.sizes.budget import machine_memory

PACKAGES = (
    "numpy", "scipy", "ml_dtypes", "numba", "torch", "transformers", "accelerate", "safetensors", "tokenizers",
    "huggingface_hub", "lm_eval",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and the machine as this process sees them, as plain values; a package that is not there is None."""
    import torch

    mps = torch.backends.mps.is_available()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "globe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in PACKAGES},
        "native": kernels.available(),
        "devices": {"cuda": gpus, "cuda_version": torch.version.cuda, "mps": mps},
        "processors": {
            "machine": os.cpu_count(),
            "affinity": affinity(),
            "quota": control_groups.processor_quota(),
            "usable": usable_processors(),
            "torch_threads": torch.get_num_threads(),
        },
        "memory": {"total": machine_memory(), "available": available_memory()},
        "waiting": waiting_policy(),
    }


def available_memory() -> int | None:
    """Bytes that the machine can give without swapping; None where it is not told (only Linux tells)."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
