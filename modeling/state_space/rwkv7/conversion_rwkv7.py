"""Checkpoints of RWKV-7: the authors' (BlinkDL/rwkv-7-world, a .pth file without a config.json), and those for
flash-linear-attention (fla-hub/rwkv7-0.4B-world)."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require
from ..conversion_rwkv import authors_model
from .configuration_rwkv7 import RANKS

MIXES = [f"x_{name}" for name in "rwkvag"]  # in the order of ours
PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "head_norm"}


def authors_fields(tensors: Tensors) -> Fields:
    """The sizes, if these are tensors of an RWKV-7."""
    if "blocks.0.att.r_k" not in tensors:
        return {}
    vocab_size, size = tensors["emb.weight"].shape
    later = tensors.get("blocks.1.att.v1", tensors["blocks.0.att.a1"])  # the first layer mixes no values in
    low_ranks = (tensors["blocks.0.att.w1"], tensors["blocks.0.att.a1"], later, tensors["blocks.0.att.g1"])
    return {
        "model_type": "RWKV-7 (.pth)",
        "vocab_size": vocab_size,
        "hidden_size": size,
        "intermediate_size": len(tensors["blocks.0.ffn.key.weight"]),
        "num_hidden_layers": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "num_attention_heads": len(tensors["blocks.0.att.r_k"]),
        **{name: matrix.shape[1] for name, matrix in zip(RANKS, low_ranks, strict=True)},
    }


def authors_config(fields: Fields) -> Fields:
    """The vocabulary of the World models ends texts with token 0, which is also what they are padded with."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return tokens | {name: value for name, value in fields.items() if name != "model_type"}


def authors_names(tensors: Tensors, fields: Fields) -> Tensors:
    """As fla has them, with matrices the way a Linear keeps them."""
    found = {}
    for name, tensor in tensors.items():
        part = name.split(".")[-1]
        if name.startswith("blocks.0.att.v") and part in ("v0", "v1", "v2"):
            continue  # never used: they are the values that later layers mix in
        tensor = tensor.squeeze() if tensor.ndim == 3 else tensor
        if len(part) == 2 and part[1] in "012":
            name = name.removesuffix(part) + f"{part[0]}_lora.lora." + ("2.bias", "0.weight", "2.weight")[int(part[1])]
            tensor = tensor.T if part[1] in "12" else tensor
        found[name.replace(".ffn.x_k", ".ffn.mix")] = tensor
    return together(found, fields)


def together(tensors: Tensors, fields: Fields) -> Tensors:
    """The mixtures of a layer as one tensor."""
    firsts = [name for name in tensors if name.endswith(f".{MIXES[0]}")]
    for stem in (name.removesuffix(MIXES[0]) for name in firsts):
        if absent := [mix for mix in MIXES if stem + mix not in tensors]:
            raise ValueError(f"The checkpoint does not fit.\n{stem} lacks {', '.join(absent)}.")
        tensors[f"{stem}mix"] = torch.stack([tensors.pop(stem + mix).flatten() for mix in MIXES])
    return tensors


def fla_names(tensors: Tensors, fields: Fields) -> Tensors:
    renamed = {name.replace(".ffn.x_k", ".ffn.mix"): tensor for name, tensor in tensors.items()}
    return together(renamed, fields)


def fla_config(fields: Fields) -> Fields:
    """The defaults are flash-linear-attention's."""
    size, layers = fields.get("hidden_size", 2048), fields.get("num_hidden_layers", 24)
    require(fields, hidden_act="sqrelu", norm_first=True, norm_bias=True, head_dim=64, attn=None)
    require(fields, value_dim=([size] * layers, size, None))
    return {
        "vocab_size": fields.get("vocab_size", 32000),
        "hidden_size": size,
        "intermediate_size": fields.get("intermediate_size") or int(fields.get("hidden_ratio", 4) * size),
        "num_hidden_layers": layers,
        "num_attention_heads": size // 64,
        "norm_eps": fields.get("norm_eps", 1e-5),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        **{name: fields.get(name, default) for name, default in zip(RANKS, (64, 64, 16, 128), strict=True)},
        **{name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def authors_rwkv7(folder: Path, fields: Fields, tensors: Tensors, head: str) -> Callable:
    """The authors' own package, told which version it is to read."""
    if os.environ.get("RWKV_V7_ON") != "1":
        raise ImportError("The package rwkv knows RWKV-7 only where it was told so before: set RWKV_V7_ON=1.")
    return authors_model(folder, fields, tensors, head)


def projection(match, config) -> list[str]:
    return [f"model.layers.{match[1]}.mixer.{PROJECTIONS.get(match[2], match[2])}.{match[3]}"]


RULES = (
    Rule(r"(?:emb|model\.embeddings)\.weight", "model.embed_tokens.weight"),
    Rule(r"(?:ln_out|model\.norm)\.(weight|bias)", r"model.norm.\1"),
    Rule(r"(?:head|lm_head)\.weight", "lm_head.weight"),
    *(
        Rule(rf"(?:blocks|model\.layers)\.(\d+)\.{theirs}", rf"model.layers.\1.{ours}")
        for theirs, ours in (
            (r"(?:ln1|attn_norm)\.(weight|bias)", r"residual.norm.mixer.\2"),
            (r"(?:ln2|ffn_norm)\.(weight|bias)", r"residual.norm.feed_forward.\2"),
            (r"(?:att|attn)\.([wavg])_lora\.lora\.0\.weight", r"mixer.\2.reduce_proj.weight"),
            (r"(?:att|attn)\.([wavg])_lora\.lora\.2\.(weight|bias)", r"mixer.\2.expand_proj.\3"),
            (r"(?:att|attn)\.(mix|k_k|k_a|r_k)", r"mixer.\2"),
            (r"attn\.([rkvo]_proj)\.weight", r"mixer.\2.weight"),
            (r"attn\.g_norm\.(weight|bias)", r"mixer.head_norm.\2"),
            (r"ffn\.mix", "feed_forward.mix"),
            (r"ffn\.key\.weight", "feed_forward.up_proj.weight"),
            (r"ffn\.value\.weight", "feed_forward.down_proj.weight"),
        )
    ),
    Rule(r"(?:blocks|model\.layers)\.0\.(?:ln0|pre_norm)\.(weight|bias)", r"model.embed_norm.\1"),
    Rule(r"blocks\.(\d+)\.att\.(receptance|key|value|output|ln_x)\.(weight|bias)", projection),
)

CONVERSIONS = (
    Conversion(
        model_type="RWKV-7 (.pth)",
        config=authors_config,
        heads={},
        default_head="ForCausalLM",
        describe=authors_fields,
        prepare=authors_names,
        original=authors_rwkv7,
        rules=RULES,
    ),
    Conversion(
        model_type="rwkv7",
        config=fla_config,
        heads={"RWKV7ForCausalLM": "ForCausalLM", "RWKV7Model": "Model"},
        default_head="ForCausalLM",
        prepare=fla_names,
        rules=RULES,
    ),
)
