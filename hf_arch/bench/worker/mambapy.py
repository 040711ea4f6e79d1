"""mamba.py's Mamba, by its parallel scan. Its language model cannot be imported without CUDA packages: the embedding
and the head are torch's own."""

import importlib

import torch
from torch import nn

from .subject import Subject


class Mamba(Subject):
    """Read by the scan, decoded by the recurrence: the two cannot be joined, so that decoding begins with no memory. A
    step costs the same."""

    def __init__(self, shape: dict, longest: int, **options):
        source = importlib.import_module("mambapy.mamba")
        config = source.MambaConfig(d_model=shape["hidden_size"], n_layers=shape["num_hidden_layers"])
        self.model = nn.ModuleDict(
            {
                "embedding": nn.Embedding(shape["vocab_size"], config.d_model),
                "layers": source.Mamba(config),
                "norm": source.RMSNorm(config.d_model, config.rms_norm_eps, config.mup),
                "head": nn.Linear(config.d_model, shape["vocab_size"], bias=False),
            }
        )
        self.config = config

    def logits(self, ids):
        return self.named(self.model["layers"](self.model["embedding"](ids)))

    def named(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model["head"](self.model["norm"](hidden))

    def begin(self, ids, room):
        weight = self.model["embedding"].weight
        inputs = weight.new_zeros(1, self.config.d_inner, self.config.d_conv - 1)
        return [(None, inputs) for _ in range(self.config.n_layers)]

    def step(self, token, memory):
        hidden, memory = self.model["layers"].step(self.model["embedding"](token[:, 0]), memory)
        self.named(hidden)
        return memory
