"""RetNet (Sun et al., 2023, arXiv:2307.08621)."""

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import RopeParameters

from ...skeleton.config import ArchConfig


@strict
class ArchRetNetConfig(ArchConfig):
    """
    num_attention_heads (`int`, defaults to 8):
        Heads; each forgets at its own fixed rate.
    value_expansion (`float`, defaults to 2.0):
        Width of the values over `hidden_size`.
    rope_parameters (`dict`, *optional*):
        `rope_theta` (defaults to 10000.0), the slowest rotation of queries and keys, in tokens per radian.
    """

    model_type = "hf_arch_retnet"
    layer_kinds = ("retention",)

    value_expansion: float | int = 2.0
    rope_parameters: RopeParameters | dict | None = None

    def validate_architecture(self):
        super().validate_architecture()
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(
                f"RetNet scales no rotations: rope_type is {self.rope_parameters['rope_type']!r}, not default."
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"The width of a head, {self.hidden_size} / {self.num_attention_heads}, must be even, to be turned."
            )
        if round(self.hidden_size * self.value_expansion) % self.num_attention_heads:
            raise ValueError(
                f"value_expansion {self.value_expansion} x hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}."
            )
