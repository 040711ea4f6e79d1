"""SSD, the layer of Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060)."""

from huggingface_hub.dataclasses import strict

from ...skeleton.config import ArchConfig


@strict
class ArchSSDConfig(ArchConfig):
    """
    num_attention_heads (`int`, defaults to 24):
        Heads, each with a decay of its own; together they are `expand` times `hidden_size` wide.
    expand (`float`, defaults to 2.0), state_size (`int`, defaults to 128):
        Width inside a layer over `hidden_size`; numbers that a state keeps for each number of a head.
    n_groups (`int`, defaults to 1):
        Groups of heads that share what goes into the state and what is read from it (B and C).
    conv_kernel (`int`, defaults to 4), use_conv_bias (`bool`):
        Tokens that the short convolution before the recurrence sees; whether it has a bias.
    time_step_min, time_step_max, time_step_floor (`float`):
        Range of the initial step sizes.
    time_step_limit (`list[float]`, *optional*):
        The two numbers that a step size is kept between; by default it is any.
    feed_forward_types (`list[str]`, *optional*):
        `"none"` by default: a layer is a mixer alone.
    """

    model_type = "hf_arch_ssd"
    layer_kinds = ("recurrent",)
    feed_forward_kinds = ("none", *ArchConfig.feed_forward_kinds)

    num_attention_heads: int = 24
    expand: float | int = 2.0
    state_size: int = 128
    n_groups: int = 1
    conv_kernel: int = 4
    use_conv_bias: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[float] | None = None
    norm_eps: float = 1e-5

    @property
    def inner_size(self) -> int:
        return round(self.expand * self.hidden_size)

    @property
    def head_dim(self) -> int:
        return self.inner_size // self.num_attention_heads

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("state_size", "n_groups", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.inner_size % self.num_attention_heads:
            raise ValueError(
                f"expand {self.expand} x hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if self.num_attention_heads % self.n_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of n_groups {self.n_groups}."
            )
        if self.time_step_limit is not None and len(self.time_step_limit) != 2:
            raise ValueError(f"time_step_limit is {self.time_step_limit}; it has two numbers, the least and the most.")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(f"time_step_min {self.time_step_min} is not between 0 and time_step_max.")
