"""The checkpoints of DeepSeek-V2, V2-Lite and V3: in the layout of the Hub, a matrix for each expert and the further
layers of multi-token prediction behind the others, and in that of transformers 5, stacked."""

import re
from collections.abc import Callable

import torch
from transformers import DeepseekV2Config, DeepseekV3Config

from ...dense.transformer.conversion_transformer import LLAMA, same_fields
from ...skeleton.conversion import Conversion, Fields, Rule, Stack, Tensors, require

SAME_IN_BOTH = (
    *("intermediate_size", "hidden_act", "rope_parameters", "attention_bias", "attention_dropout"),
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace"),
    *("routed_scaling_factor", "output_router_logits"),
)


def fields_of_both(config, fields: Fields) -> Fields:
    require(fields, num_key_value_heads=(config.num_attention_heads, None), mlp_bias=False, moe_layer_freq=1)
    by_sequence = fields.get("seq_aux", True)
    return same_fields(config, *SAME_IN_BOTH) | {
        "norm_eps": config.rms_norm_eps,
        "num_local_experts": config.n_routed_experts,
        "n_group": config.n_group or 1,
        "topk_group": config.topk_group or 1,
        "sequence_balance_coef": fields.get("aux_loss_alpha", 0.0) if by_sequence else 0.0,
    }


def deepseek_v2_config(fields: Fields) -> Fields:
    methods = ("greedy", "group_limited_greedy")
    require(fields, topk_method=methods, scoring_func="softmax", norm_topk_prob=False)
    config = DeepseekV2Config.from_dict(fields)
    return fields_of_both(config, fields) | {"topk_method": config.topk_method, "norm_topk_prob": False}


def deepseek_v3_config(fields: Fields, num_nextn_predict_layers: int = 0) -> Fields:
    require(fields, topk_method="noaux_tc", scoring_func="sigmoid", rope_interleave=True)
    config = DeepseekV3Config.from_dict(fields)
    return fields_of_both(config, fields) | {
        "topk_method": "noaux_tc",
        "norm_topk_prob": config.norm_topk_prob,
        "num_nextn_predict_layers": num_nextn_predict_layers,
    }


def in_halves(rows: torch.Tensor) -> torch.Tensor:
    """[heads, rope, ...], whose neighbours are turned together -> first numbers of all pairs, then the second ones."""
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1)


def query_in_halves(tensor: torch.Tensor, config) -> torch.Tensor:
    nope, rope = tensor.unflatten(0, (config.num_attention_heads, -1)).split(
        (config.qk_nope_head_dim, config.qk_rope_head_dim), dim=1
    )
    return torch.cat((nope, in_halves(rope)), dim=1).flatten(0, 1)


def key_in_halves(tensor: torch.Tensor, config) -> torch.Tensor:
    latent, rope = tensor.split((config.kv_lora_rank, config.qk_rope_head_dim))
    return torch.cat((latent, in_halves(rope[None])[0]))


def further_layers(tensors: Tensors, fields: Fields) -> Tensors:
    """Those behind the last one predict further tokens."""
    count = fields.get("num_hidden_layers", DeepseekV3Config.num_hidden_layers)

    def renamed(name: str) -> str:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        return f"mtp.{int(match[1]) - count}.{match[2]}" if match and int(match[1]) >= count else name

    tensors = LLAMA.prepare(tensors, fields)
    return {renamed(name): tensor for name, tensor in tensors.items()}


def where_asked(name: str) -> Callable:
    """`name` where the config asks for the layers that predict further tokens, else nothing."""

    def targets(match: re.Match, config) -> list[str]:
        return [match.expand(name)] if config.num_nextn_predict_layers else []

    return targets


IN_LAYER = (  # their name, ours, and what is done with the rows
    (r"self_attn\.q_proj\.weight", "mixer.query.q_proj.weight", query_in_halves),
    (r"self_attn\.q_a_proj\.(weight|bias)", r"mixer.query.q_a_proj.\2", None),
    (r"self_attn\.q_a_layernorm\.weight", "mixer.query.q_a_norm.weight", None),
    (r"self_attn\.q_b_proj\.weight", "mixer.query.q_b_proj.weight", query_in_halves),
    (r"self_attn\.kv_a_proj_with_mqa\.(weight|bias)", r"mixer.kv_a_proj.\2", key_in_halves),
    (r"self_attn\.kv_a_layernorm\.weight", "mixer.kv_a_norm.weight", None),
    (r"self_attn\.kv_b_proj\.weight", "mixer.expansion.kv_b_proj.weight", None),
    (r"self_attn\.o_proj\.(weight|bias)", r"mixer.o_proj.\2", None),
    (r"mlp\.gate\.weight", "feed_forward.router.gate.weight", None),
    (r"mlp\.gate\.e_score_correction_bias", "feed_forward.router.bias.value", None),
    (r"mlp\.(experts\.\w+_proj|(?:shared_experts\.)?\w+_proj\.weight)", r"feed_forward.\2", None),
    (r"input_layernorm\.weight", "residual.norm.mixer.weight", None),
    (r"post_attention_layernorm\.weight", "residual.norm.feed_forward.weight", None),
)
IN_FURTHER_LAYER = (
    (r"enorm\.weight", r"model.mtp.\1.embedding_norm.weight"),
    (r"hnorm\.weight", r"model.mtp.\1.hidden_norm.weight"),
    (r"eh_proj\.weight", r"model.mtp.\1.projection.weight"),
    (r"shared_head\.norm\.weight", r"model.mtp.\1.norm.weight"),
    (r"embed_tokens\.weight", "model.embed_tokens.weight"),
    (r"shared_head\.head\.weight", "lm_head.weight"),
)
STACKS = tuple(
    Stack(rf"(.+\.experts)\.(\d+)\.({'|'.join(parts)})\.weight", rf"\1.{target}", parts)
    for target, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
)
RULES = (
    *(
        Rule(rf"(?:model\.)?layers\.(\d+)\.{theirs}", rf"model.layers.\1.{ours}", change=change)
        for theirs, ours, change in IN_LAYER
    ),
    *(
        Rule(rf"mtp\.(\d+)\.{theirs}", where_asked(rf"model.mtp.\1.layer.{ours}"), change=change)
        for theirs, ours, change in IN_LAYER
    ),
    *(Rule(rf"mtp\.(\d+)\.{theirs}", where_asked(ours)) for theirs, ours in IN_FURTHER_LAYER),
    *LLAMA.rules,
)
HEADS = {"ForCausalLM": "ForCausalLM", "Model": "Model", "ForSequenceClassification": "ForSequenceClassification"}

DEEPSEEK_V2 = Conversion(
    model_type="deepseek_v2",
    config=deepseek_v2_config,
    heads={f"DeepseekV2{name}": head for name, head in HEADS.items()},
    default_head="ForCausalLM",
    prepare=LLAMA.prepare,
    stacks=STACKS,
    rules=RULES,
)
DEEPSEEK_V3 = Conversion(
    model_type="deepseek_v3",
    config=deepseek_v3_config,
    choices=("num_nextn_predict_layers",),
    heads={f"DeepseekV3{name}": head for name, head in HEADS.items()}
    | {"DeepseekV3ForTokenClassification": "ForTokenClassification"},
    default_head="ForCausalLM",
    prepare=further_layers,
    stacks=STACKS,
    rules=RULES,
)

CONVERSIONS = (DEEPSEEK_V2, DEEPSEEK_V3)
