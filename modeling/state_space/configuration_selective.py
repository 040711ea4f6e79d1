"""What the state spaces of Mamba have in common."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ..skeleton.config import ArchConfig


@strict
class SelectiveConfig(ArchConfig):
    """
    expand (`float`, defaults to 2.0), state_size (`int`):
        Width inside a layer over `hidden_size`; numbers that a state keeps for each of these.
    conv_kernel (`int`, defaults to 4), use_conv_bias (`bool`):
        Tokens that the short convolution before the recurrence sees; whether it has a bias.
    time_step_min, time_step_max, time_step_floor (`float`):
        Range of the initial step sizes.
    feed_forward_types (`list[str]`, *optional*):
        `"none"` by default: a layer is a mixer alone.
    """

    feed_forward_kinds: ClassVar[tuple[str, ...]] = ("none", *ArchConfig.feed_forward_kinds)

    expand: float | int = 2.0
    state_size: int = 16
    conv_kernel: int = 4
    use_conv_bias: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    norm_eps: float = 1e-5

    @property
    def inner_size(self) -> int:
        return round(self.expand * self.hidden_size)

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("inner_size", "state_size", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(f"time_step_min {self.time_step_min} is not between 0 and time_step_max.")
