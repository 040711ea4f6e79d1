"""performer-pytorch's causal language model, which has no cache."""

import importlib

from .subject import Subject


class Performer(Subject):
    """With as many features as ours."""

    def __init__(self, shape: dict, longest: int, **options):
        size, heads = shape["hidden_size"], shape["num_attention_heads"]
        self.model = importlib.import_module("performer_pytorch").PerformerLM(
            num_tokens=shape["vocab_size"],
            max_seq_len=longest,
            dim=size,
            depth=shape["num_hidden_layers"],
            heads=heads,
            dim_head=size // heads,
            ff_mult=shape["intermediate_size"] // size,
            nb_features=options["num_features"],
            causal=True,
        )

    def logits(self, ids):
        return self.model(ids)
