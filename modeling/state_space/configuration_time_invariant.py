"""What state spaces that are the same at every step have in common."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ..skeleton.config import ArchConfig


@strict
class TimeInvariantConfig(ArchConfig):
    """
    state_size (`int`, defaults to 64):
        Numbers that a state keeps for each channel, two for each pair of conjugates.
    initialization (`str`, defaults to `"lin"`):
        How a diagonal state space begins: S4D-`"lin"`, `"inv"`, `"legs"` or `"real"` (arXiv:2206.11893, section 4).
    discretization (`str`):
        How a diagonal state space becomes one of steps: `"zoh"`, where its input is held between steps, or
        `"bilinear"`.
    time_step_min, time_step_max (`float`):
        Range of the initial step sizes.
    """

    state_size: int = 64
    initialization: Literal["lin", "inv", "legs", "real"] = "lin"
    discretization: Literal["zoh", "bilinear"] = "bilinear"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    norm_eps: float = 1e-5

    def validate_architecture(self):
        super().validate_architecture()
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(f"state_size is {self.state_size}; states are pairs of numbers: it must be even.")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(f"time_step_min {self.time_step_min} is not between 0 and time_step_max.")
