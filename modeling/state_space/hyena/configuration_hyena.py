"""Hyena (Poli et al., 2023, arXiv:2302.10866)."""

from huggingface_hub.dataclasses import strict

from ...skeleton.config import ArchConfig
from ...skeleton.expert_config import SPARSE


@strict
class ArchHyenaConfig(ArchConfig):
    """
    layer_types (`list[str]`, *optional*):
        `"hyena"`, with filters as long as the text, or `"modal_hyena"`, with filters that are sums of fading waves and
        need a small state of fixed size (what `hf_arch.distill` makes of the former).
    max_position_embeddings (`int`, defaults to 1024):
        The longest text: a filter is a function of the time over it, and knows none past it. Another value makes
        another filter of the same weights.
    hyena_order (`int`, defaults to 2):
        One more than the long convolutions of a layer; its gates.
    short_filter_order (`int`, defaults to 3):
        Tokens that the short convolution sees.
    filter_order, filter_emb_dim (`int`):
        Width of the network that makes the filters; its inputs: time, and cosines and sines of it, an odd number.
    filter_frequency, filter_shift (`float`):
        Where the frequencies of its sines begin; how much of a filter is left where it has faded.
    state_size (`int`, defaults to 16):
        Waves that make up a filter in layers of type `"modal_hyena"`.
    """

    model_type = "hf_arch_hyena"
    layer_kinds = ("hyena", "modal_hyena")
    feed_forward_kinds = ("dense", "gated", *SPARSE, "none")

    num_attention_heads: int = 1
    max_position_embeddings: int = 1024
    hyena_order: int = 2
    short_filter_order: int = 3
    filter_order: int = 64
    filter_emb_dim: int = 5
    filter_frequency: float | int = 10.0
    filter_shift: float | int = 0.05
    state_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_eps: float = 1e-5

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("max_position_embeddings", "short_filter_order", "filter_order", "state_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hyena_order < 2:
            raise ValueError(f"hyena_order is {self.hyena_order}; it must be at least 2, one long convolution.")
        if self.filter_emb_dim < 3 or self.filter_emb_dim % 2 == 0:
            raise ValueError(
                f"filter_emb_dim is {self.filter_emb_dim}; it must be odd, 3 or more: time, its cosines and sines."
            )
