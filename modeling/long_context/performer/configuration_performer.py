"""Performer (Choromanski et al., 2020, arXiv:2009.14794)."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from ...dense.transformer.configuration_transformer import ArchTransformerConfig
from ...skeleton.expert_config import SPARSE


@strict
class ArchPerformerConfig(ArchTransformerConfig):
    """The choices of the Transformer, save those that touch single pairs of tokens: there is no bias of their scores,
    and `attention_dropout` has nothing to drop. Feed-forwards are by default dense, with gelu.

    kernel_type (`str`, defaults to `"softmax"`):
        What the products of features estimate: `"softmax"`, the attention of a Transformer; `"relu"`, generalised
        attention, a kernel of its own.
    num_features (`int`, *optional*):
        Random features of a query or key; by default `head_dim * ln(head_dim)`, to a multiple of 16. The error falls
        with their square root.
    feature_redraw_interval (`int`, *optional*):
        Optimizer steps after which others are drawn; None keeps the first.
    kernel_epsilon (`float`, defaults to 1e-3):
        What is added to each feature of `"relu"`, so that no token is without weight.
    """

    model_type = "hf_arch_performer"
    layer_kinds = ("favor", "bidirectional_favor")
    feed_forward_kinds = ("dense", "gated", *SPARSE)
    layer_kinds_of = {"causal": ("favor",), "bidirectional": ("bidirectional_favor",)}

    direction: Literal["causal", "bidirectional"] = "causal"
    position_type: Literal["none", "sinusoidal", "learned", "rope"] = "rope"
    hidden_act: str = "gelu"
    kernel_type: Literal["softmax", "relu"] = "softmax"
    num_features: int | None = None
    feature_redraw_interval: int | None = 1000
    kernel_epsilon: float = 1e-3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_features is None and self.head_dim:
            self.num_features = 16 * max(1, int(self.head_dim * math.log(self.head_dim) / 16))

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("num_features", "feature_redraw_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.kernel_epsilon <= 0:
            raise ValueError(f"kernel_epsilon is {self.kernel_epsilon}; it must be positive.")
