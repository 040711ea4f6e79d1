"""S6, the layer of Mamba (Gu and Dao, 2023, arXiv:2312.00752)."""

import math

from huggingface_hub.dataclasses import strict

from ..configuration_selective import SelectiveConfig


@strict
class ArchS6Config(SelectiveConfig):
    """
    time_step_rank (`int`, *optional*):
        Rank of the projection of step sizes, a sixteenth of `hidden_size` by default.
    """

    model_type = "hf_arch_s6"
    layer_kinds = ("s6",)

    num_attention_heads: int = 1
    time_step_rank: int | None = None

    def __post_init__(self, **kwargs):
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        if self.time_step_rank < 1:
            raise ValueError(f"time_step_rank is {self.time_step_rank}; it must be at least 1.")
