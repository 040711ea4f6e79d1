"""Mixtral's checkpoints: in the layout of the Hub, a matrix for each expert, and in that of transformers 5, stacked."""

from transformers import MixtralConfig

from ...dense.transformer.conversion_transformer import LLAMA, same_fields
from ...skeleton.conversion import Conversion, Fields, Rule, Stack, require


def mixtral_config(fields: Fields) -> Fields:
    require(fields, router_jitter_noise=0.0)
    config = MixtralConfig.from_dict(fields)
    more = ("intermediate_size", "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters", "sliding_window")
    more += ("attention_dropout", "num_local_experts", "num_experts_per_tok")
    more += ("router_aux_loss_coef", "output_router_logits")
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return same_fields(config, *more) | {
        "norm_eps": config.rms_norm_eps,
        "layer_types": [kind] * config.num_hidden_layers,
    }


MIXTRAL = Conversion(
    model_type="mixtral",
    config=mixtral_config,
    heads={
        "MixtralForCausalLM": "ForCausalLM",
        "MixtralModel": "Model",
        "MixtralForSequenceClassification": "ForSequenceClassification",
        "MixtralForTokenClassification": "ForTokenClassification",
        "MixtralForQuestionAnswering": "ForQuestionAnswering",
    },
    default_head="ForCausalLM",
    prepare=LLAMA.prepare,
    stacks=(
        Stack(r"(.+\.experts)\.(\d+)\.(w1|w3)\.weight", r"\1.gate_up_proj", parts=("w1", "w3")),
        Stack(r"(.+\.experts)\.(\d+)\.(w2)\.weight", r"\1.down_proj", parts=("w2",)),
    ),
    rules=(
        *(
            Rule(
                rf"(?:model\.)?layers\.(\d+)\.(?:block_sparse_moe|mlp)\.{theirs}",
                rf"model.layers.\1.feed_forward.{ours}",
            )
            for theirs, ours in ((r"gate\.weight", "router.gate.weight"), (r"(experts\.\w+_proj)", r"\2"))
        ),
        *LLAMA.rules,
    ),
)

CONVERSIONS = (MIXTRAL,)
