"""Transformer-XL (Dai et al., 2019, arXiv:1901.02860)."""

from huggingface_hub.dataclasses import strict

from ...ops.segment_attention import Window
from ...skeleton.config import ArchConfig


@strict
class ArchTransformerXLConfig(ArchConfig):
    """
    segment_length (`int`, defaults to 512):
        Tokens of a segment, counted from the beginning of a document. In training, gradients stop at its start.
    memory_length (`int`, defaults to 512):
        Tokens before its segment that a token sees in each layer.
    same_length (`bool`, defaults to `False`):
        Whether each token sees `memory_length` tokens before itself instead, wherever its segment begins.
    clamp_length (`int`, *optional*):
        The distance from which on all distances count as this one.
    head_dim (`int`, *optional*):
        Width of a head, by default `hidden_size / num_attention_heads`.
    untie_biases (`bool`, defaults to `True`):
        Whether each layer has the two biases of its queries, u and v, for itself, or all share them.
    residual_type (`str`, defaults to `"post_norm"`):
        `"post_norm"`, or `"pre_norm"`, as in the original without a norm at the end.
    """

    model_type = "hf_arch_transformer_xl"
    layer_kinds = ("segment_recurrence",)
    feed_forward_kinds = ("dense", "gated", "sparse")

    segment_length: int = 512
    memory_length: int = 512
    same_length: bool = False
    clamp_length: int | None = None
    head_dim: int | None = None
    untie_biases: bool = True
    residual_type: str = "post_norm"
    hidden_act: str = "relu"
    mlp_bias: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def window(self) -> Window:
        return Window(self.segment_length, self.memory_length, self.same_length)

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("segment_length", "memory_length", "head_dim", "clamp_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.residual_type not in ("post_norm", "pre_norm"):
            raise ValueError(f"residual_type {self.residual_type!r} is unknown; there are post_norm, pre_norm.")
