"""A stack of several mixers: recurrences beside windows, as in Samba (Ren et al., 2024, arXiv:2406.07522), or beside
full attention and with experts, as in Jamba (Lieber et al., 2024, arXiv:2403.19887)."""

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ...dense.transformer.configuration_transformer import ArchTransformerConfig
from ...layers.cache import RECURRENT
from ...long_context.performer.configuration_performer import ArchPerformerConfig
from ...skeleton.config import ArchConfig, SinkAttentionConfig
from ..h3.configuration_h3 import ArchH3Config
from ..hyena.configuration_hyena import ArchHyenaConfig
from ..retnet.configuration_retnet import ArchRetNetConfig
from ..rwkv4.configuration_rwkv4 import ArchRWKV4Config
from ..rwkv7.configuration_rwkv7 import ArchRWKV7Config
from ..s4.configuration_s4 import ArchS4Config
from ..s6.configuration_s6 import ArchS6Config
from ..ssd.configuration_ssd import ArchSSDConfig

GUEST_CONFIGS = ArchRetNetConfig, ArchS4Config, ArchH3Config, ArchS6Config, ArchSSDConfig
GUEST_CONFIGS += ArchRWKV4Config, ArchRWKV7Config, ArchHyenaConfig, ArchPerformerConfig
CONFIGS: dict[str, type[ArchConfig]] = {
    kind: config for config in GUEST_CONFIGS for kind in config.layer_kinds if kind in RECURRENT
}
FIXED = {"rwkv7": {"value_residual": False}}  # what is no choice for mixers that stand among others
SINK_POSITIONS = ("none", "sinusoidal", "learned", "rope")  # that attention to sinks can tell
# What a stack and the mixers in it have in common
SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
SHARED += ("norm_eps", "max_position_embeddings", "initializer_range", "hidden_dropout", "attention_dropout")
SHARED += ("attention_bias", "mlp_bias", "pad_token_id")


@strict
class ArchHybridConfig(ArchTransformerConfig, SinkAttentionConfig):
    """The choices of the Transformer, for a causal stack whose `layer_types` name any of the mixers.

    layer_types (`list[str]`, *optional*):
        `"full_attention"`; `"sliding_attention"`; `"sink_attention"`, the last `sliding_window` tokens and the first
        `num_sink_tokens`; or the layer type of another architecture, such as `"s6"`. By default S6 and windows in turn,
        as in Samba.
    mixer_options (`dict[str, dict]`, *optional*):
        What the mixers of other architectures are told beside the sizes of the stack: for a layer type, fields of its
        architecture's config, such as `{"s6": {"state_size": 16}}`.
    feed_forward_types (`list[str]`, *optional*):
        `"gated"`, `"dense"`, `"sparse"`, or `"none"` for a layer that is a mixer alone.
    """

    model_type = "hf_arch_hybrid"
    layer_kinds = ("full_attention", "sliding_attention", "sink_attention", *CONFIGS)
    layer_kinds_of = {"causal": layer_kinds}
    feed_forward_kinds = (*ArchConfig.feed_forward_kinds, "none")

    sliding_window: int | None = 2048
    mixer_options: dict[str, dict] | None = None

    def layer_pattern(self) -> list[str]:
        return ["s6", "sliding_attention"]

    def mixer_tp_plan(self) -> dict[str, str]:
        """Plans name modules of all layers alike, so that there is none where some are not attention."""
        return {} if set(self.layer_types) & set(CONFIGS) else super().mixer_tp_plan()

    def of_mixer(self, kind: str) -> ArchConfig:
        """The config that a mixer of another architecture is built from: the stack's sizes, and its own options."""
        shared = {name: getattr(self, name) for name in SHARED}
        layers = {"layer_types": [kind] * self.num_hidden_layers} | FIXED.get(kind, {})
        return CONFIGS[kind](**(shared | (self.mixer_options or {}).get(kind, {}) | layers))

    def validate_architecture(self):
        if self.direction != "causal":
            raise ValueError(f"A hybrid is causal: direction cannot be {self.direction!r}.")
        super().validate_architecture()
        if "sink_attention" in self.layer_types and self.position_type not in SINK_POSITIONS:
            raise ValueError(
                f"Layers of type sink_attention know no positions of type {self.position_type!r}; position_type is one "
                f"of {', '.join(SINK_POSITIONS)}."
            )
        guests, told = set(self.layer_types) & set(CONFIGS), self.mixer_options or {}
        if unused := sorted(set(told) - guests):
            raise ValueError(
                f"mixer_options tells {', '.join(unused)}; of other architectures, layer_types has "
                f"{', '.join(sorted(guests)) or 'none'}."
            )
        for kind in guests:
            choices = set(CONFIGS[kind].__dataclass_fields__) - set(FIXED.get(kind, {})) - {"layer_types"}
            if unknown := sorted(set(told.get(kind, {})) - choices):
                raise ValueError(f"mixer_options of {kind} has {', '.join(unknown)}, which is no choice of a mixer.")
            try:
                self.of_mixer(kind)
            except (ValueError, StrictDataclassError) as error:
                raise ValueError(f"In the mixers of type {kind}: {error.__cause__ or error}") from error
