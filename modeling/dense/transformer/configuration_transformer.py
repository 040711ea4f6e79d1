"""The Transformer (Vaswani et al., 2017, arXiv:1706.03762) and the choices that later models made in it."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.config import AttentionConfig
from ...skeleton.directed import DirectedConfig


@strict
class ArchTransformerConfig(AttentionConfig, DirectedConfig):
    """The default is a Llama: causal, RMSNorm before each sub-layer, rotary positions, SwiGLU.

    direction (`str`, defaults to `"causal"`):
        `"causal"`; `"bidirectional"`, an encoder; `"prefix"`, causal after a prefix that attends both ways and is told
        by `prefix_length` or `prefix_mask` in the call.
    residual_type (`str`, defaults to `"pre_norm"`):
        `"pre_norm"`, `"post_norm"`, `"deep_norm"` (with its initialisation) or `"parallel"`.
    norm_type (`str`, defaults to `"rms_norm"`):
        `"rms_norm"` or `"layer_norm"`.
    position_type (`str`, defaults to `"rope"`):
        `"none"`, `"sinusoidal"`, `"learned"`, `"rope"`, `"xpos"`, `"alibi"` or `"t5"`.
    relative_attention_num_buckets, relative_attention_max_distance (`int`):
        Of T5's bias.
    attention_scaling (`float`, *optional*):
        What the products of queries and keys are multiplied by, head_dim^-0.5 by default; 1.0 in T5.
    num_hidden_groups (`int`, *optional*):
        Sets of parameters that successive layers share, as in ALBERT (arXiv:1909.11942); by default each has its own.
    feed_forward_types (`list[str]`, *optional*), hidden_act (`str`):
        `"gated"` or `"dense"` feed-forwards around any activation, SwiGLU is gated silu, GeGLU gated gelu; or mixtures
        of experts, such as `"sparse"`.
    """

    model_type = "hf_arch_transformer"
    layer_kinds = ("full_attention", "sliding_attention", "bidirectional_attention")
    layer_kinds_of: ClassVar[dict[str, tuple[str, ...]]] = {
        "causal": ("full_attention", "sliding_attention"),
        "prefix": ("full_attention",),
        "bidirectional": ("bidirectional_attention",),
    }

    direction: Literal["causal", "bidirectional", "prefix"] = "causal"
    residual_type: Literal["pre_norm", "post_norm", "deep_norm", "parallel"] = "pre_norm"
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    position_type: Literal["none", "sinusoidal", "learned", "rope", "xpos", "alibi", "t5"] = "rope"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    attention_scaling: float | int | None = None
    num_hidden_groups: int | None = None

    def mixer_tp_plan(self) -> dict[str, str]:
        biased = self.position_type in ("alibi", "t5")  # a bias per head does not follow the heads to their shards
        return {} if biased else super().mixer_tp_plan()

    @property
    def turns_pairs(self) -> bool:
        return self.position_type in ("rope", "xpos")

    @property
    def layer_groups(self) -> list[int]:
        groups = self.num_hidden_groups or self.num_hidden_layers
        return [layer * groups // self.num_hidden_layers for layer in range(self.num_hidden_layers)]

    def validate_architecture(self):
        super().validate_architecture()
        if self.attention_scaling is not None and self.attention_scaling <= 0:
            raise ValueError(f"attention_scaling is {self.attention_scaling}; it must be positive.")
        if self.position_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"position_type 'sinusoidal' needs an even hidden_size, not {self.hidden_size}.")
        if self.position_type == "xpos" and self.max_position_embeddings > 32768:
            raise ValueError("position_type 'xpos' overflows past 32768 positions: lower max_position_embeddings.")
        if (
            self.position_type == "t5"
            and self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2
        ):
            raise ValueError("relative_attention_max_distance must be over half of relative_attention_num_buckets.")
        self.validate_groups()

    def validate_groups(self):
        groups = self.num_hidden_groups or self.num_hidden_layers
        if not 1 <= groups <= self.num_hidden_layers:
            raise ValueError(f"num_hidden_groups {groups} is not between 1 and the {self.num_hidden_layers} layers.")
        kinds = set(zip(self.layer_groups, self.layer_types, self.feed_forward_types, strict=True))
        if len(kinds) != groups:
            raise ValueError("Layers of one group share their parameters: they must be of one layer type.")
