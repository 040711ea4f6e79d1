"""Checkpoints of the Transformer-XL that transformers had until 4.57, transfo-xl/transfo-xl-wt103 among them.

A text there begins with a memory of zeros that tokens look at, unless the caller gives an empty one, as the authors'
code does and ours. With `same_length` a token there sees `mem_len` tokens with itself, one less than ours.
"""

import torch

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require

DEFAULTS = {
    "vocab_size": 267735,
    "cutoffs": [20000, 40000, 200000],
    "d_model": 1024,
    "d_embed": 1024,
    "n_head": 16,
    "d_head": 64,
    "d_inner": 4096,
    "div_val": 4,
    "n_layer": 18,
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "pre_lnorm": False,
    "untie_r": True,
    "tie_projs": [False, True, True, True],
    "dropout": 0.1,
    "dropatt": 0.0,
    "layer_norm_epsilon": 1e-5,
}


def transformer_xl_config(fields: Fields, segment_length: int | None = None) -> Fields:
    """The defaults are transformers'. A config.json that says no `tgt_len` leaves the length of a segment open."""
    require(fields, attn_type=0, sample_softmax=(-1, 0))
    told = DEFAULTS | {name: fields[name] for name in DEFAULTS if name in fields}
    segment_length = segment_length or fields.get("tgt_len") or told["mem_len"]
    words_tied = fields.get("tie_word_embeddings", fields.get("tie_weight", True))
    clusters = len(told["cutoffs"]) + 1
    tokens = {name: fields.get(name) for name in ("pad_token_id", "bos_token_id")}
    return tokens | {
        "eos_token_id": fields.get("eos_token_id", 0),
        "vocab_size": told["vocab_size"],
        "hidden_size": told["d_model"],
        "intermediate_size": told["d_inner"],
        "num_hidden_layers": told["n_layer"],
        "num_attention_heads": told["n_head"],
        "head_dim": told["d_head"],
        "segment_length": segment_length,
        "memory_length": told["mem_len"] - told["same_length"],
        "same_length": told["same_length"],
        "clamp_length": told["clamp_len"] if told["clamp_len"] > 0 else None,
        "untie_biases": told["untie_r"],
        "residual_type": "pre_norm" if told["pre_lnorm"] else "post_norm",
        "embedding_size": told["d_embed"],
        "cutoffs": told["cutoffs"] or None,
        "div_val": told["div_val"] if told["cutoffs"] else 1,
        "tie_projections": ([*told["tie_projs"]] + [False] * clusters)[:clusters],
        "tie_word_embeddings": words_tied,
        "hidden_dropout": told["dropout"],
        "attention_dropout": told["dropatt"],
        "norm_eps": told["layer_norm_epsilon"],
    }


def with_projections(tensors: Tensors, fields: Fields) -> Tensors:
    """Where a vocabulary is cut and nothing is projected, ours projects by the identity."""
    told = DEFAULTS | fields
    if told["div_val"] != 1 or told["d_embed"] != told["d_model"] or not told["cutoffs"]:
        return tensors
    eye = torch.eye(told["d_model"], dtype=tensors["transformer.word_emb.emb_layers.0.weight"].dtype)
    names = ["transformer.word_emb.emb_projs.0"]
    if any(name.startswith("crit.") for name in tensors):
        names += [f"crit.out_projs.{i}" for i in range(len(told["cutoffs"]) + 1)]
    return {name: eye.clone() for name in names} | tensors


def table(match, config) -> list[str]:
    """A vocabulary that is not cut has one plain table."""
    return [f"model.embed_tokens.tables.{match[1]}.weight" if config.adaptive else "model.embed_tokens.weight"]


def of_head(match, config) -> list[str]:
    number, kind = match.groups()
    return [f"lm_head.tables.{number}.{kind}" if config.adaptive else f"lm_head.{kind}"]


def thirds(tensor: torch.Tensor, config) -> tuple[torch.Tensor, ...]:
    return tensor.chunk(3)


OF_LAYER = r"transformer\.layers\.(\d+)\."
TRANSFO_XL = Conversion(
    model_type="transfo-xl",
    config=transformer_xl_config,
    choices=("segment_length",),
    heads={"TransfoXLLMHeadModel": "ForCausalLM", "TransfoXLModel": "Model"},
    default_head="ForCausalLM",
    prepare=with_projections,
    rules=(
        Rule(r"transformer\.pos_emb\.inv_freq"),  # computed
        Rule(r"transformer\.word_emb\.emb_layers\.(\d+)\.weight", table),
        Rule(r"transformer\.word_emb\.emb_projs\.(\d+)", r"model.embed_tokens.projections.\1.weight"),
        Rule(r"crit\.out_layers\.(\d+)\.(weight|bias)", of_head),
        Rule(r"crit\.out_projs\.(\d+)", r"lm_head.projections.\1.weight"),
        Rule(r"crit\.cluster_(weight|bias)", r"lm_head.cluster_names.\1"),
        Rule(r"transformer\.r_w_bias", "model.embed_positions.biases.content_bias"),
        Rule(r"transformer\.r_r_bias", "model.embed_positions.biases.distance_bias"),
        Rule(OF_LAYER + r"dec_attn\.r_w_bias", r"model.layers.\1.mixer.biases.content_bias"),
        Rule(OF_LAYER + r"dec_attn\.r_r_bias", r"model.layers.\1.mixer.biases.distance_bias"),
        Rule(
            OF_LAYER + r"dec_attn\.qkv_net\.weight",
            *(rf"model.layers.\1.mixer.{name}_proj.weight" for name in "qkv"),
            change=thirds,
        ),
        Rule(OF_LAYER + r"dec_attn\.r_net\.weight", r"model.layers.\1.mixer.relative.r_proj.weight"),
        Rule(OF_LAYER + r"dec_attn\.o_net\.weight", r"model.layers.\1.mixer.o_proj.weight"),
        Rule(OF_LAYER + r"dec_attn\.layer_norm\.(weight|bias)", r"model.layers.\1.residual.norm.mixer.\2"),
        Rule(OF_LAYER + r"pos_ff\.CoreNet\.0\.(weight|bias)", r"model.layers.\1.feed_forward.up_proj.\2"),
        Rule(OF_LAYER + r"pos_ff\.CoreNet\.3\.(weight|bias)", r"model.layers.\1.feed_forward.down_proj.\2"),
        Rule(OF_LAYER + r"pos_ff\.layer_norm\.(weight|bias)", r"model.layers.\1.residual.norm.feed_forward.\2"),
    ),
)

CONVERSIONS = (TRANSFO_XL,)
