"""S4 and S4D (Gu et al., 2021, arXiv:2111.00396; 2022, arXiv:2206.11893)."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.directed import DirectedConfig
from ..configuration_time_invariant import TimeInvariantConfig


@strict
class ArchS4Config(TimeInvariantConfig, DirectedConfig):
    """
    layer_types (`list[str]`, *optional*):
        `"s4d"`, a diagonal state space, by default; `"s4"`, a diagonal one plus a matrix of rank one, which begins as
        HiPPO-LegS and is discretised by the bilinear rule.
    direction (`str`, defaults to `"causal"`):
        `"causal"`, or `"bidirectional"`: an encoder, whose state spaces read the text from both ends.
    feed_forward_types (`list[str]`, *optional*):
        `"none"` by default: a layer is a mixer alone.
    """

    model_type = "hf_arch_s4"
    layer_kinds = ("s4d", "s4")
    feed_forward_kinds: ClassVar[tuple[str, ...]] = ("none", *TimeInvariantConfig.feed_forward_kinds)

    discretization: Literal["zoh", "bilinear"] = "zoh"
    num_attention_heads: int = 1
