"""RWKV-7 of the authors' package, which reads a checkpoint and holds no module: the numbers are random."""

import importlib
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from .subject import Subject

RANKS = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}  # over the square root of the width


class RWKV7(Subject):
    """A whole sequence at a time, or a token after it; it has no backward."""

    def __init__(self, shape: dict, longest: int, **options):
        os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1"}  # read when the package is imported
        tensors = random_tensors(shape)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(tensors, Path(folder) / "random.pth")
            self.theirs = importlib.import_module("rwkv.model").RWKV(f"{folder}/random", "cpu fp32")
        self.model = nn.ParameterList(tensors.values())  # to be counted

    def logits(self, ids):
        return self.theirs.forward(ids[0].tolist(), None, full_output=True)[0][None]

    def begin(self, ids, room):
        return self.theirs.forward(ids[0].tolist(), None)[1]

    def step(self, token, memory):
        return self.theirs.forward(token[0].tolist(), memory)[1]


def random_tensors(shape: dict) -> dict[str, torch.Tensor]:
    """In the layout of BlinkDL/rwkv-7-world."""
    size, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    vectors = [f"att.x_{name}" for name in "rwkvag"] + [f"att.{name}" for name in ("k_k", "k_a", "w0", "a0", "v0")]
    shapes = {f"{name}.weight": (vocabulary, size) for name in ("emb", "head")}
    norms = ["ln_out", "blocks.0.ln0"]
    for block in (f"blocks.{layer}." for layer in range(shape["num_hidden_layers"])):
        norms += [f"{block}{name}" for name in ("ln1", "ln2", "att.ln_x")]
        shapes |= {f"{block}{name}": (1, 1, size) for name in (*vectors, "ffn.x_k")}
        for name, factor in RANKS.items():
            rank = max(32, 32 * round(factor * math.sqrt(size) / 32))
            shapes |= {f"{block}att.{name}1": (size, rank), f"{block}att.{name}2": (rank, size)}
        shapes |= {f"{block}att.{name}.weight": (size, size) for name in ("receptance", "key", "value", "output")}
        heads = shape["num_attention_heads"]
        shapes |= {f"{block}att.r_k": (heads, size // heads)}
        shapes |= {f"{block}ffn.key.weight": (inner, size), f"{block}ffn.value.weight": (size, inner)}
    tensors = {name: torch.randn(sizes) * size**-0.5 for name, sizes in shapes.items()}
    return tensors | {f"{name}.{kind}": torch.ones(size) for name in norms for kind in ("weight", "bias")}
