"""Checkpoints of Mamba-2: those of the authors' code (state-spaces/mamba2-130m) and those of transformers."""

import math

from transformers import Mamba2Config

from ...skeleton.conversion import Conversion, Fields, Rule, require


def transformers_config(fields: Fields) -> Fields:
    require(fields, hidden_act=("silu", "swish"))
    config = Mamba2Config.from_dict({name: value for name, value in fields.items() if name != "time_step_limit"})
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "expand", "state_size", "n_groups", "conv_kernel")
    same += ("use_conv_bias", "time_step_min", "time_step_max", "time_step_floor")
    same += ("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    return {name: getattr(config, name) for name in same} | {
        "num_attention_heads": config.num_heads,
        "attention_bias": config.use_bias,
        "norm_eps": config.layer_norm_epsilon,
        "time_step_limit": step_limit(fields.get("time_step_limit")),
    }


def step_limit(limit: list | None) -> list[float] | None:
    """None for 0 to infinity, which transformers writes as {"__float__": "Infinity"}."""
    if limit is None or limit[0] == 0 and limit[1] in (math.inf, {"__float__": "Infinity"}):
        return None
    return [float(number) for number in limit]


def authors_config(fields: Fields) -> Fields:
    """The defaults are those of the authors' `MambaConfig` and `Mamba2`."""
    require(fields, rms_norm=True, d_intermediate=0, attn_layer_idx=([],))
    layer = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1} | fields.get("ssm_cfg", {})
    require(layer, layer="Mamba2", norm_before_gate=False, rmsnorm=True, D_has_hdim=False, d_ssm=None)
    multiple = fields.get("pad_vocab_size_multiple", 8)
    return {
        "vocab_size": math.ceil(fields["vocab_size"] / multiple) * multiple,
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layer"],
        "num_attention_heads": layer["expand"] * fields["d_model"] // layer["headdim"],
        "expand": layer["expand"],
        "state_size": layer["d_state"],
        "n_groups": layer["ngroups"],
        "conv_kernel": layer["d_conv"],
        "use_conv_bias": layer.get("conv_bias", True),
        "attention_bias": layer.get("bias", False),
        "time_step_limit": step_limit(layer.get("dt_limit")),
        "tie_word_embeddings": fields.get("tie_embeddings", True),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


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

CONVERSIONS = (
    Conversion(
        model_type="mamba2",
        config=transformers_config,
        heads={"Mamba2ForCausalLM": "ForCausalLM", "Mamba2Model": "Model"},
        default_head="ForCausalLM",
        rules=RULES,
    ),
    Conversion(
        model_type="state-spaces",  # theirs says none
        mark="ssm_cfg",
        config=authors_config,
        heads={"MambaLMHeadModel": "ForCausalLM"},
        default_head="ForCausalLM",
        rules=RULES,
    ),
)
