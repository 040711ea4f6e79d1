"""What the checkpoints of Mamba and Mamba-2 have in common, in the layouts of the authors and of transformers."""

import math
from collections.abc import Callable

from transformers import PreTrainedConfig

from ..skeleton.conversion import Conversion, Fields, Rule, require

SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "expand", "state_size", "conv_kernel", "use_conv_bias")
SAME += ("time_step_min", "time_step_max", "time_step_floor", "initializer_range")
SAME += ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")

RULES = (
    Rule(r"(?:backbone\.)?embeddings?\.weight", "model.embed_tokens.weight"),
    Rule(r"(?:backbone\.)?layers\.(\d+)\.norm\.weight", r"model.layers.\1.residual.norm.mixer.weight"),
    Rule(
        r"(?:backbone\.)?layers\.(\d+)\.mixer\.conv1d\.weight",
        r"model.layers.\1.mixer.convolution.weight",
        change=lambda weight, config: weight.squeeze(1),
    ),
    Rule(r"(?:backbone\.)?layers\.(\d+)\.mixer\.conv1d\.bias", r"model.layers.\1.mixer.convolution.bias"),
    Rule(r"(?:backbone\.)?layers\.(\d+)\.mixer\.(.+)", r"model.layers.\1.mixer.\2"),
    Rule(r"(?:backbone\.)?norm_f\.weight", "model.norm.weight"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
)


def transformers_fields(fields: Fields, config: PreTrainedConfig) -> Fields:
    """Of transformers' config, made of `fields`, what both have."""
    require(fields, hidden_act=("silu", "swish"))
    return {name: getattr(config, name) for name in SAME} | {
        "attention_bias": config.use_bias,
        "norm_eps": config.layer_norm_epsilon,
    }


def authors_fields(fields: Fields, state_size: int, multiple: int) -> Fields:
    """The defaults are those of the authors' `MambaConfig` and of its layer."""
    require(fields, rms_norm=True, d_intermediate=0, attn_layer_idx=([],))
    layer, multiple = fields.get("ssm_cfg", {}), fields.get("pad_vocab_size_multiple", multiple)
    return {
        "vocab_size": math.ceil(fields["vocab_size"] / multiple) * multiple,
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layer"],
        "expand": layer.get("expand", 2),
        "state_size": layer.get("d_state", state_size),
        "conv_kernel": layer.get("d_conv", 4),
        "use_conv_bias": layer.get("conv_bias", True),
        "attention_bias": layer.get("bias", False),
        "tie_word_embeddings": fields.get("tie_embeddings", True),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def conversions(name: str, config: Callable, authors_config: Callable, rules: tuple = RULES) -> tuple[Conversion, ...]:
    """Of what transformers calls `name`, such as "Mamba", and of what the authors published, which says no type."""
    common = {"default_head": "ForCausalLM", "rules": rules}
    heads = {f"{name}ForCausalLM": "ForCausalLM", f"{name}Model": "Model"}
    authors = {"MambaLMHeadModel": "ForCausalLM"}
    return (
        Conversion(model_type=name.lower(), config=config, heads=heads, **common),
        Conversion(model_type="state-spaces", mark="ssm_cfg", config=authors_config, heads=authors, **common),
    )
