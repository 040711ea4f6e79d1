"""Checkpoints of GPT-Neo (EleutherAI/gpt-neo-125m, -1.3B, -2.7B), in the layout of transformers and of the Hub.

GPT-Neo does not scale its scores, and its projections of queries, keys and values have no bias: ours are zero.
"""

import torch
from transformers import GPTNeoConfig

from ...dense.transformer.conversion_transformer import same_fields, score_without_bias
from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require

ONE_PASS = {"gelu_new": "gelu_pytorch_tanh"}  # the same function
LAYERS = {"global": "full_attention", "local": "sliding_attention"}


def gpt_neo_config(fields: Fields) -> Fields:
    config = GPTNeoConfig.from_dict(fields)
    require({"embed_dropout": config.embed_dropout}, embed_dropout=config.resid_dropout)
    return same_fields(config) | {
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "layer_types": [LAYERS[kind] for kind in config.attention_layers],
        "sliding_window": config.window_size,
        "hidden_act": ONE_PASS.get(config.activation_function, config.activation_function),
        "norm_eps": config.layer_norm_epsilon,
        "attention_scaling": 1.0,
        "hidden_dropout": config.resid_dropout,
        "attention_dropout": config.attention_dropout,
    }


def with_zero_biases(tensors: Tensors, fields: Fields) -> Tensors:
    """Those that ours have and the original lacks."""
    projections = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    biases = {
        name.removesuffix("weight") + "bias": torch.zeros(len(x), dtype=x.dtype)
        for name, x in tensors.items()
        if name.endswith(projections)
    }
    return score_without_bias(biases | tensors, fields)


GPT_NEO = Conversion(
    model_type="gpt_neo",
    config=gpt_neo_config,
    heads={
        "GPTNeoForCausalLM": "ForCausalLM",
        "GPTNeoModel": "Model",
        "GPTNeoForSequenceClassification": "ForSequenceClassification",
        "GPTNeoForTokenClassification": "ForTokenClassification",
        "GPTNeoForQuestionAnswering": "ForQuestionAnswering",
    },
    default_head="ForCausalLM",
    prepare=with_zero_biases,
    rules=(
        Rule(r"(?:transformer\.)?wte\.weight", "model.embed_tokens.weight"),
        Rule(r"(?:transformer\.)?wpe\.weight", "model.embed_positions.embed_positions.weight"),
        Rule(r"(?:transformer\.)?ln_f\.(\w+)", r"model.norm.\1"),
        *(
            Rule(rf"(?:transformer\.)?h\.(\d+)\.{theirs}", *(rf"model.layers.\1.{ours}" for ours in ours))
            for theirs, ours in (
                (r"attn\.attention\.(?:bias|masked_bias)", ()),  # the causal mask
                (r"attn\.attention\.([qkv]_proj\.\w+)", (r"mixer.\2",)),
                (r"attn\.attention\.out_proj\.(\w+)", (r"mixer.o_proj.\2",)),
                (r"mlp\.c_fc\.(\w+)", (r"feed_forward.up_proj.\2",)),
                (r"mlp\.c_proj\.(\w+)", (r"feed_forward.down_proj.\2",)),
                (r"ln_1\.(\w+)", (r"residual.norm.mixer.\2",)),
                (r"ln_2\.(\w+)", (r"residual.norm.feed_forward.\2",)),
            )
        ),
        Rule(r"(lm_head\.weight|score\.\w+|qa_outputs\.\w+)", r"\1"),
        Rule(r"classifier\.(\w+)", r"score.\1"),
    ),
)

CONVERSIONS = (GPT_NEO,)
