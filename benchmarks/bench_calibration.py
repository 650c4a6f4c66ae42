"""Calibration: experts and the sums of their statistics at the sizes of a real layer, and a small checkpoint whole."""

from importlib.util import find_spec
from pathlib import Path

import torch

from globe.checkpoint.index import Checkpoint
from globe.runs.stages import Stages
from globe.statistics.experts import Experts
from globe.statistics.manner import NOT_ASKED, Manner, OwnPlan
from globe.statistics.measure import measure
from globe.statistics.moments import Moments
from globe.statistics.windows import Reading

from .synthetic import LIKE, write_synthetic

TOKENS = 2048
# experts, choices of a token, d, p: the SmolLM2 mixture, and as many tokens for an expert of Qwen1.5-MoE's size
SIZES = {"smollm2": (4, 4, 576, 384), "qwen1.5-moe": (4, 1, 2048, 1408)}


class Layer:
    params = (list(SIZES), ["diagonal", "hidden"])
    param_names = ("size", "moments")

    def setup(self, size, moments):
        torch.set_num_threads(1)
        experts, choices, d, p = SIZES[size]
        random = torch.Generator().manual_seed(0)
        gate_up, down = (0.05 * torch.randn(dims, generator=random) for dims in ((experts, 2 * p, d), (experts, d, p)))
        self.experts = Experts(gate_up, down, torch.nn.functional.silu)
        self.x = torch.randn(TOKENS, d, generator=random)
        self.chosen = torch.rand(TOKENS, experts, generator=random).topk(choices).indices
        self.weights = torch.rand(TOKENS, choices, generator=random)
        _, self.seen = self.experts.run(self.x, self.chosen, self.weights)
        self.moments = Moments(experts, d, p, ("hidden_moment",) if moments == "hidden" else ())

    def time_experts(self, size, moments):
        self.experts.run(self.x, self.chosen, self.weights)

    def time_moments(self, size, moments):
        self.moments.add(self.seen, self.x, 0)


class Checkpoints:
    def setup_cache(self):
        root = Path("model").absolute()
        write_synthetic(root, LIKE["tiny"])
        return root

    def setup(self, root):
        if find_spec("transformers") is None:
            raise NotImplementedError
        torch.set_num_threads(1)
        windows = torch.randint(LIKE["tiny"].vocabulary, (16, 512), generator=torch.Generator().manual_seed(0))
        self.reading = Reading(Checkpoint(root), windows, "random tokens", {"tokens": windows.numel(), "window": 512})

    def time_measure(self, root):
        measure(
            self.reading,
            Manner(torch.device("cpu"), (), "fp32", OwnPlan(0), NOT_ASKED),
            root.parent / "statistics",
            Stages(),
        )

    def peakmem_measure(self, root):
        self.time_measure(root)
