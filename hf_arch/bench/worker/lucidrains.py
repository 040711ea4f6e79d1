"""Packages of lucidrains' (Phil Wang's) that have no model of transformers' kind."""

import importlib

import torch.nn.functional as F

from .subject import Subject

CONTEXT = 16384  # what its clusters are made for: they are as many at any length, each of WINDOW tokens
WINDOW = 128


class RoutingTransformer(Subject):
    """Half of the heads local, as in ours."""

    def __init__(self, shape: dict, longest: int, **options):
        peer = importlib.import_module("routing_transformer")
        heads = shape["num_attention_heads"]
        self.model = peer.RoutingTransformerLM(
            num_tokens=shape["vocab_size"],
            dim=shape["hidden_size"],
            depth=shape["num_hidden_layers"],
            max_seq_len=CONTEXT,
            heads=heads,
            dim_head=shape["hidden_size"] // heads,
            window_size=WINDOW,
            causal=True,
            n_local_attn_heads=heads // 2,
            ff_mult=shape["intermediate_size"] // shape["hidden_size"],
        )

    def logits(self, ids):
        return self.model(ids)[0]

    def loss(self, ids):
        """With that of the distance to centroids, as the package trains."""
        logits, commitment = self.model(ids)
        return F.cross_entropy(logits[0, :-1], ids[0, 1:]) + commitment.sum()


class Hourglass(Subject):
    """A layer before and after, the others on groups, as in ours; groups are mapped to one item and back."""

    def __init__(self, shape: dict, longest: int, **options):
        peer = importlib.import_module("hourglass_transformer_pytorch")
        self.model = peer.HourglassTransformerLM(
            num_tokens=shape["vocab_size"],
            dim=shape["hidden_size"],
            max_seq_len=longest,
            depth=(1, shape["num_hidden_layers"] - 2, 1),
            shorten_factor=options["shorten_factor"],
            heads=shape["num_attention_heads"],
            dim_head=shape["hidden_size"] // shape["num_attention_heads"],
            updown_sample_type="linear",
        )

    def logits(self, ids):
        return self.model(ids)


class MegaByte(Subject):
    """A layer over bytes, the others over patches, twice as wide, with twice the heads, as in ours of so few layers:
    the package has as many heads everywhere."""

    def __init__(self, shape: dict, longest: int, **options):
        peer = importlib.import_module("MEGABYTE_pytorch.megabyte")
        size, heads, patch = shape["hidden_size"], shape["num_attention_heads"], options["patch_size"]
        told = {"dim_head": size // heads, "rel_pos": True, "flash_attn": True}
        told["ff_mult"] = shape["intermediate_size"] // size
        layers = shape["num_hidden_layers"] - 1
        self.model = peer.MEGABYTE(
            num_tokens=shape["vocab_size"],
            dim=(2 * size, size),
            depth=(layers, 1),
            max_seq_len=(-(-longest // patch), patch),
            heads=heads,
            **told,
        )
        self.model.transformers[0] = peer.Transformer(dim=2 * size, layers=layers, heads=2 * heads, **told)

    def logits(self, ids):
        return self.model(ids)

    def loss(self, ids):
        return self.model(ids, return_loss=True)
