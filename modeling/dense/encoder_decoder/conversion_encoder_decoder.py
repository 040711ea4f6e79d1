"""T5 (Raffel et al., 2020, arXiv:1910.10683), T5 1.1 and FLAN-T5, in the layout of transformers and of the Hub."""

import copy

from transformers import PreTrainedConfig, T5Config

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require

SAME_AS_T5 = ("vocab_size", "relative_attention_num_buckets", "relative_attention_max_distance", "pad_token_id")
SAME_AS_T5 += ("eos_token_id", "use_cache", "id2label", "label2id", "problem_type")


def t5_config(fields: Fields) -> Fields:
    require(fields, is_encoder_decoder=(True, False), is_decoder=False)
    config = T5Config.from_dict(fields)
    return t5_fields(config, fields) | {
        "feed_forward_types": ["gated" if config.is_gated_act else "dense"] * config.num_decoder_layers,
        # a head is tied where it reads scaled states; transformers 5 says "tied" of all
        "scale_logits": config.scale_decoder_outputs,
        "tie_word_embeddings": config.scale_decoder_outputs,
    }


def t5_fields(config: PreTrainedConfig, fields: Fields) -> Fields:
    """What T5 and its kin say alike."""
    return {name: copy.deepcopy(getattr(config, name)) for name in SAME_AS_T5} | {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "head_dim": config.d_kv,
        "num_attention_heads": config.num_heads,
        "encoder_num_hidden_layers": config.num_layers,
        "num_hidden_layers": config.num_decoder_layers,
        "hidden_act": config.dense_act_fn,
        "norm_eps": config.layer_norm_epsilon,
        "position_type": "t5",
        "attention_scaling": 1.0,
        "hidden_dropout": config.dropout_rate,
        "attention_dropout": config.dropout_rate,
        "bos_token_id": None,
        "decoder_start_token_id": fields.get("decoder_start_token_id", config.pad_token_id),
    }


def head_of_its_own(tensors: Tensors, fields: Fields) -> Tensors:
    """transformers 5 also ties heads that read unscaled states, where they are new, and then stores them once."""
    if "lm_head.weight" not in tensors and "shared.weight" in tensors:
        tensors = tensors | {"lm_head.weight": tensors["shared.weight"]}
    return tensors


def t5_block(stack: str, layer: int, theirs: str, ours: str) -> Rule:
    return Rule(
        rf"(?:transformer\.)?{stack}\.block\.(\d+)\.layer\.{layer}\.{theirs}", rf"model.{stack}.layers.\1.{ours}"
    )


def t5_stack_rules(stack: str, parts: tuple[str, ...], feed_forward: dict[str, str]) -> tuple[Rule, ...]:
    """Of the blocks of a stack, whose layers T5 numbers and we call by `parts`."""
    rules = []
    for layer, part in enumerate(parts):
        rules.append(t5_block(stack, layer, r"layer_norm\.weight", f"residual.norm.{part}.weight"))
        if part != "feed_forward":
            rules.append(t5_block(stack, layer, r"\w+Attention\.([qkvo])\.weight", rf"{part}.\2_proj.weight"))
    for theirs, ours in feed_forward.items():
        rules.append(t5_block(stack, len(parts) - 1, theirs, f"feed_forward.{ours}"))
    return tuple(rules)


def t5_rules(feed_forward: dict[str, str]) -> tuple[Rule, ...]:
    """`feed_forward`: the names of its tensors, and ours."""
    return (
        Rule(r"(?:transformer\.)?shared\.weight", "model.encoder.embed_tokens.weight"),
        Rule(r"(?:transformer\.)?(encoder|decoder)\.embed_tokens\.weight", r"model.\1.embed_tokens.weight"),
        Rule(
            r"(?:transformer\.)?(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
            r"model.\1.embed_positions.relative_attention_bias.weight",
        ),
        Rule(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),  # old, and never used
        Rule(r"(?:transformer\.)?(encoder|decoder)\.final_layer_norm\.weight", r"model.\1.norm.weight"),
        *t5_stack_rules("encoder", ("mixer", "feed_forward"), feed_forward),
        *t5_stack_rules("decoder", ("mixer", "cross_attention", "feed_forward"), feed_forward),
        Rule(r"(lm_head\.weight)", r"\1"),
        Rule(r"classifier\.(\w+)", r"score.\1"),
    )


T5_FEED_FORWARD = {
    rf"DenseReluDense\.{theirs}\.weight": f"{ours}.weight"
    for theirs, ours in {"wi": "up_proj", "wi_1": "up_proj", "wi_0": "gate_proj", "wo": "down_proj"}.items()
}


T5 = Conversion(
    model_type="t5",
    config=t5_config,
    heads={
        "T5ForConditionalGeneration": "ForConditionalGeneration",
        "T5WithLMHeadModel": "ForConditionalGeneration",
        "T5Model": "Model",
        "T5EncoderModel": "EncoderModel",
        "T5ForTokenClassification": "ForTokenClassification",
    },
    default_head="ForConditionalGeneration",
    prepare=head_of_its_own,
    rules=t5_rules(T5_FEED_FORWARD),
)

CONVERSIONS = (T5,)
