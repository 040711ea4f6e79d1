"""The Switch Transformer (Fedus et al., 2021, arXiv:2101.03961), in the layout of transformers and of the Hub."""

from transformers import SwitchTransformersConfig

from ...dense.encoder_decoder.conversion_encoder_decoder import head_of_its_own, t5_fields, t5_rules
from ...skeleton.conversion import Conversion, Fields, Stack, require

SAME_AS_SWITCH = ("router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef")
ROW = 512  # tokens of a row in the training of the released checkpoints
FEED_FORWARD = {
    r"mlp\.wi\.weight": "up_proj.weight",
    r"mlp\.wo\.weight": "down_proj.weight",
    r"mlp\.(experts\.\w+_proj)": r"\2",
    r"mlp\.router\.classifier\.weight": "router.gate.weight",
}


def switch_config(fields: Fields, eval_capacity_factor: float | None = None) -> Fields:
    """Their experts have room for `expert_capacity` tokens of a row, however long it is, in evaluation too. Our room
    grows with the row, and is limited in training alone: `expert_capacity_factor` gives as much of it in a row of
    `n_positions` tokens, or of 512, as the released checkpoints were trained with (64 tokens for each of 8 experts: a
    factor of 1). To drop what they drop in rows of n, choose eval_capacity_factor=expert_capacity * num_experts / n."""
    require(fields, is_encoder_decoder=(True, False), is_decoder=False, router_bias=False, router_dtype="float32")
    config = SwitchTransformersConfig.from_dict(fields)
    encoder = switched(config.num_layers, config.encoder_sparse_step)
    decoder = switched(config.num_decoder_layers, config.decoder_sparse_step)
    room = config.expert_capacity * config.num_experts / fields.get("n_positions", ROW)
    return (
        t5_fields(config, fields)
        | {name: getattr(config, name) for name in SAME_AS_SWITCH}
        | {
            "encoder_feed_forward_types": encoder,
            "feed_forward_types": decoder,
            "num_local_experts": config.num_experts if "switch" in encoder + decoder else None,
            "expert_capacity_factor": room,
            "eval_capacity_factor": eval_capacity_factor,
            "scale_logits": config.tie_word_embeddings,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
    )


def switched(layers: int, step: int) -> list[str]:
    return ["switch" if step > 0 and layer % step == 1 % step else "dense" for layer in range(layers)]


SWITCH = Conversion(
    model_type="switch_transformers",
    config=switch_config,
    choices=("eval_capacity_factor",),
    heads={
        "SwitchTransformersForConditionalGeneration": "ForConditionalGeneration",
        "SwitchTransformersModel": "Model",
        "SwitchTransformersEncoderModel": "EncoderModel",
    },
    default_head="ForConditionalGeneration",
    prepare=head_of_its_own,
    stacks=tuple(
        Stack(rf"(.+\.mlp\.experts)\.expert_(\d+)\.({theirs})\.weight", rf"\1.{ours}", parts=(theirs,))
        for theirs, ours in (("wi", "up_proj"), ("wo", "down_proj"))
    ),
    rules=t5_rules(FEED_FORWARD),
)

CONVERSIONS = (SWITCH,)
