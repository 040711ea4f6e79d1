"""RWKV (Peng et al., 2023, arXiv:2305.13048)."""

from huggingface_hub.dataclasses import strict

from ...skeleton.config import ArchConfig


@strict
class ArchRWKV4Config(ArchConfig):
    """
    attention_hidden_size, intermediate_size (`int`, *optional*):
        Channels of the time mixing, by default `hidden_size`; width inside the channel mixing, by default four times
        as much.
    """

    model_type = "hf_arch_rwkv4"
    layer_kinds = ("rwkv4",)
    feed_forward_kinds = ("rwkv4_channel_mixing", *ArchConfig.feed_forward_kinds)

    attention_hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int = 1
    norm_eps: float = 1e-5
    embedding_norm: bool = True

    def __post_init__(self, **kwargs):
        if self.attention_hidden_size is None:
            self.attention_hidden_size = self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        if self.attention_hidden_size < 1:
            raise ValueError(f"attention_hidden_size is {self.attention_hidden_size}; it must be at least 1.")
