"""Checkpoints of RWKV-4: the .pth files of its author (BlinkDL/rwkv-4-pile-169m), without a config.json, and those of
transformers (RWKV/rwkv-4-169m-pile).

transformers halves the stream and some weights every `rescale_every` layers in eval: the same function, in which the
epsilon of the norms is a little larger. Ours is the one that was trained.
"""

import re

import torch
from transformers import RwkvConfig

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require
from ..conversion_rwkv import authors_model

SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "attention_hidden_size", "intermediate_size")


def transformers_config(fields: Fields) -> Fields:
    require(fields, layer_norm_epsilon=1e-5)  # its last norm knows no other
    config = RwkvConfig.from_dict(fields)
    tokens = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
    return {name: getattr(config, name) for name in (*SAME, *tokens)} | {
        "max_position_embeddings": config.context_length
    }


def author_fields(tensors: Tensors) -> Fields:
    """The sizes, if these are tensors of an RWKV-4."""
    if "blocks.0.att.time_mix_k" not in tensors or tensors["blocks.0.att.time_decay"].ndim != 1:
        return {}
    vocab_size, hidden_size = tensors["emb.weight"].shape
    return {
        "model_type": "RWKV-4 (.pth)",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": sum(name.endswith(".att.time_decay") for name in tensors),
        "attention_hidden_size": len(tensors["blocks.0.att.time_decay"]),
        "intermediate_size": len(tensors["blocks.0.ffn.key.weight"]),
    }


def author_config(fields: Fields) -> Fields:
    return {name: fields[name] for name in SAME} | {"bos_token_id": 0, "eos_token_id": 0}


def join_mixtures(tensors: Tensors, fields: Fields) -> Tensors:
    """One tensor for the mixtures of a layer, receptance first, of those for each."""
    others, found = {}, {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.time_mix_([rkv])\w*", name):
            found.setdefault(match[1], {})[match[2]] = tensor.flatten()
        else:
            others[name] = tensor
    joined = {f"{of}.time_mix": torch.stack([mix[x] for x in "rkv" if x in mix]) for of, mix in found.items()}
    return others | joined


RULES = (
    Rule(r"(?:(?:rwkv\.)?embeddings|emb)\.weight", "model.embed_tokens.weight"),
    Rule(r"(?:rwkv\.)?blocks\.0\.(?:pre_ln|ln0)\.(\w+)", r"model.embed_norm.\1"),
    Rule(r"(?:rwkv\.)?ln_out\.(\w+)", r"model.norm.\1"),
    Rule(r"head\.weight", "lm_head.weight"),
    *(
        Rule(rf"(?:rwkv\.)?blocks\.(\d+)\.{theirs}", rf"model.layers.\1.{ours}")
        for theirs, ours in (
            (r"ln1\.(\w+)", r"residual.norm.mixer.\2"),
            (r"ln2\.(\w+)", r"residual.norm.feed_forward.\2"),
            (r"att(?:ention)?\.([\w.]+)", r"mixer.\2"),
            (r"(?:feed_forward|ffn)\.([\w.]+)", r"feed_forward.\2"),
        )
    ),
)

CONVERSIONS = (
    Conversion(
        model_type="rwkv",
        config=transformers_config,
        heads={"RwkvForCausalLM": "ForCausalLM", "RwkvModel": "Model"},
        default_head="ForCausalLM",
        prepare=join_mixtures,
        rules=RULES,
    ),
    Conversion(
        model_type="RWKV-4 (.pth)",
        config=author_config,
        heads={},
        default_head="ForCausalLM",
        describe=author_fields,
        prepare=join_mixtures,
        original=authors_model,
        rules=RULES,
    ),
)
