"""Hourglass (Nawrot et al., 2021, arXiv:2110.13711)."""

import math
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.config import AttentionConfig
from ...skeleton.directed import DirectedConfig
from ...skeleton.hierarchy_config import HierarchyConfig


@strict
class ArchHourglassConfig(AttentionConfig, DirectedConfig, HierarchyConfig):
    """
    layer_types (`list[str]`, *optional*):
        `"ragged_attention"`, to all earlier items of the level, or `"causal_window_attention"`, to the last
        `sliding_window` of them; of an encoder `"bidirectional_attention"`.
    shorten_factors (`list[int]`, defaults to `[3]`):
        How many items of a level are one of the next, at each level but the last: `[2, 3]` is an hourglass in an
        hourglass, whose inmost layers see a sixth of the tokens.
    layer_levels (`list[int]`, *optional*):
        By default as in the paper: of twelve layers two before and two after, `2@1 8@3 2@1`.
    resampling_type (`str`, defaults to `"linear"`):
        `"linear"`, a map of the items of a group to one and back, or `"average"`, their mean and its repetition.
    attention_resampling (`bool`, defaults to `True`):
        Whether the shortened item then attends to its group, and items to the answer to it.
    direction (`str`, defaults to `"causal"`):
        `"causal"`: the group of an item ends with the one that begins it in the paper's order, so that no item hears of
        later ones. `"bidirectional"`: an encoder, whose groups begin there.
    position_type (`str`, defaults to `"rope"`):
        `"rope"`, at every level by the places of its own items, or `"learned"`, a vector per token, once.
    norm_type (`str`, defaults to `"layer_norm"`):
        `"layer_norm"` or `"rms_norm"`.
    """

    model_type = "hf_arch_hourglass"
    layer_kinds = ("ragged_attention", "causal_window_attention", "bidirectional_attention")
    layer_kinds_of: ClassVar[dict[str, tuple[str, ...]]] = {
        "causal": ("ragged_attention", "causal_window_attention"),
        "bidirectional": ("bidirectional_attention",),
    }
    feed_forward_kinds = ("dense", "gated", "sparse", "switch")

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    shorten_factors: list[int] | None = None
    resampling_type: Literal["linear", "average"] = "linear"
    attention_resampling: bool = True
    position_type: Literal["rope", "learned"] = "rope"
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5
    mlp_bias: bool = True

    def __post_init__(self, **kwargs):
        if self.shorten_factors is None:
            self.shorten_factors = [3]
        super().__post_init__(**kwargs)

    @property
    def num_levels(self) -> int:
        return len(self.shorten_factors) + 1

    @property
    def turns_pairs(self) -> bool:
        return self.position_type == "rope"

    @property
    def shortest(self) -> int:
        """How many tokens an item of the last level stands for."""
        return math.prod(self.shorten_factors)

    def validate_architecture(self):
        if wrong := [factor for factor in self.shorten_factors if factor < 2]:
            raise ValueError(f"shorten_factors has {wrong[0]}: a group has at least two items.")
        super().validate_architecture()
        if not self.shorten_factors:
            raise ValueError("shorten_factors is empty: a model that shortens nothing is a Transformer.")
