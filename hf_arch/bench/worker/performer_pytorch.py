"""performer-pytorch's language model. It has no cache: what it would generate, it reads anew at each token."""

import importlib

from .subject import Subject


class Performer(Subject):
    """With as many features as ours, and its own rotary positions."""

    def __init__(self, shape: dict, longest: int, causal: bool = True, **options):
        size, heads = shape["hidden_size"], shape["num_attention_heads"]
        self.model = importlib.import_module("performer_pytorch").PerformerLM(
            num_tokens=shape["vocab_size"],
            max_seq_len=longest,
            dim=size,
            depth=shape["num_hidden_layers"],
            heads=heads,
            dim_head=size // heads,
            ff_mult=shape["intermediate_size"] // size,
            causal=causal,
        )

    def logits(self, ids):
        return self.model(ids)
