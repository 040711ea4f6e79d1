"""RWKV-7 "Goose" (Peng et al., 2025, arXiv:2503.14456)."""

from huggingface_hub.dataclasses import strict

from ...skeleton.config import ArchConfig

# The rank of each projection in two steps, over the square root of hidden_size
RANKS = {"decay_low_rank_dim": 2.5, "a_low_rank_dim": 2.5, "v_low_rank_dim": 1.7, "gate_low_rank_dim": 5.0}


@strict
class ArchRWKV7Config(ArchConfig):
    """
    num_attention_heads (`int`, defaults to 32):
        Heads, each with a memory of its own; 64 numbers wide in the released models.
    decay_low_rank_dim, a_low_rank_dim, v_low_rank_dim, gate_low_rank_dim (`int`, *optional*):
        Ranks of the projections that say how fast memory fades, how much of it is exchanged, how much of the first
        layer's values are mixed in, and what of the answer passes. By default multiples of 32 that grow with the square
        root of `hidden_size`, as the authors suggest.
    value_residual (`bool`, defaults to `True`):
        Whether later layers mix the values of the first into their own; not where the mixer stands among others.
    feed_forward_types (`list[str]`, *optional*):
        `"rwkv7_channel_mixing"` by default: a dense feed-forward that also sees the token before.
    """

    model_type = "hf_arch_rwkv7"
    layer_kinds = ("rwkv7",)
    feed_forward_kinds = ("rwkv7_channel_mixing", *ArchConfig.feed_forward_kinds)

    num_attention_heads: int = 32
    intermediate_size: int = 8192
    norm_eps: float = 1e-5
    embedding_norm: bool = True
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    value_residual: bool = True

    def __post_init__(self, **kwargs):
        for name, factor in RANKS.items():
            if getattr(self, name) is None:
                setattr(self, name, max(32, 32 * round(factor * self.hidden_size**0.5 / 32)))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        for name in RANKS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
