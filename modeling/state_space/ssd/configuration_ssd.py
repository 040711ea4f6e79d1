"""SSD, the layer of Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060)."""

from huggingface_hub.dataclasses import strict

from ..configuration_selective import SelectiveConfig


@strict
class ArchSSDConfig(SelectiveConfig):
    """
    num_attention_heads (`int`, defaults to 64):
        Heads, each with a decay of its own; together they are `expand` times `hidden_size` wide.
    n_groups (`int`, defaults to 1):
        Groups of heads that share what goes into the state and what is read from it (B and C).
    time_step_limit (`list[float]`, *optional*):
        The two numbers that a step size is kept between; by default it is any.
    """

    model_type = "hf_arch_ssd"
    layer_kinds = ("ssd",)

    num_attention_heads: int = 64
    state_size: int = 128
    n_groups: int = 1
    time_step_limit: list[float] | None = None

    @property
    def head_dim(self) -> int:
        return self.inner_size // self.num_attention_heads

    def validate_architecture(self):
        super().validate_architecture()
        if self.inner_size % self.num_attention_heads:
            raise ValueError(
                f"expand {self.expand} x hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if self.n_groups < 1 or self.num_attention_heads % self.n_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of n_groups {self.n_groups}."
            )
        if self.time_step_limit is not None and len(self.time_step_limit) != 2:
            raise ValueError(f"time_step_limit is {self.time_step_limit}; it has two numbers, the least and the most.")
