"""Checkpoints of RWKV-7: the authors' (BlinkDL/rwkv-7-world, a .pth file without a config.json), and those for
flash-linear-attention (fla-hub/rwkv7-0.4B-world)."""

import torch

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require
from .configuration_rwkv7 import RANKS

MIXES = [f"x_{name}" for name in "rwkvag"]  # in the order of our `mix`


def authors_fields(tensors: Tensors) -> Fields:
    """What the shapes of the tensors say: the file has no config.json."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    (vocab_size, size), heads = tensors["emb.weight"].shape, len(tensors["blocks.0.att.r_k"])
    later = tensors.get("blocks.1.att.v1", tensors["blocks.0.att.a1"])  # the first layer has none that counts
    return {
        "vocab_size": vocab_size,
        "hidden_size": size,
        "intermediate_size": len(tensors["blocks.0.ffn.key.weight"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "decay_low_rank_dim": tensors["blocks.0.att.w1"].shape[1],
        "a_low_rank_dim": tensors["blocks.0.att.a1"].shape[1],
        "v_low_rank_dim": later.shape[1],
        "gate_low_rank_dim": tensors["blocks.0.att.g1"].shape[1],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def fla_config(fields: Fields) -> Fields:
    """The defaults are flash-linear-attention's."""
    require(fields, hidden_act="sqrelu", norm_first=True, norm_bias=True, head_dim=64, attn=None)
    size = fields.get("hidden_size", 2048)
    require(fields, value_dim=(None, size, [size] * fields.get("num_hidden_layers", 24)))
    return {
        "vocab_size": fields.get("vocab_size", 32000),
        "hidden_size": size,
        "intermediate_size": fields.get("intermediate_size") or int(fields.get("hidden_ratio", 4) * size),
        "num_hidden_layers": fields.get("num_hidden_layers", 24),
        "num_attention_heads": size // 64,
        "norm_eps": fields.get("norm_eps", 1e-5),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        **{name: fields.get(name, default) for name, default in zip(RANKS, (64, 64, 16, 128), strict=True)},
        **{name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
