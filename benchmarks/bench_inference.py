"""A factored model in transformers: loading, composing on a miss, and a forward step, beside its dense export."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import globe
from globe import Settings, compress, export

from .synthetic import LIKE, write_synthetic

PROMPT, STEP = 64, 1


class Inference:
    params = ([PROMPT, STEP],)
    param_names = ("tokens",)

    def setup_cache(self):
        root = Path("inference").absolute()
        write_synthetic(root / "model", LIKE["tiny"])
        compress(root / "model", root / "out", Settings(rank=0.5, outer_loops=0, device="cpu", calibrate="none"))
        export(root / "out", root / "dense")
        return root

    def setup(self, root, tokens):
        torch.set_num_threads(1)
        self.kept = globe.load(root / "out", cache="all")
        self.composed = globe.load(root / "out", cache=0)
        self.dense = AutoModelForCausalLM.from_pretrained(root / "dense")
        self.ids = torch.arange(tokens)[None] % self.dense.config.vocab_size
        self.bank = next(iter(self.kept.globe.banks.values()))

    def time_load(self, root, tokens):
        globe.load(root / "out")

    def time_load_dense(self, root, tokens):
        AutoModelForCausalLM.from_pretrained(root / "dense")

    def time_miss(self, root, tokens):
        self.bank.compose(3, torch.bfloat16)

    def time_forward_all(self, root, tokens):
        with torch.inference_mode():
            self.kept(self.ids)

    def time_forward_none(self, root, tokens):
        with torch.inference_mode():
            self.composed(self.ids)

    def time_forward_dense(self, root, tokens):
        with torch.inference_mode():
            self.dense(self.ids)
