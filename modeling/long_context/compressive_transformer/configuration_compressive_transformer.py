"""Compressive Transformer (Rae et al., 2019, arXiv:1911.05507)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ..configuration_segment_recurrence import SegmentRecurrenceConfig


@strict
class ArchCompressiveTransformerConfig(SegmentRecurrenceConfig):
    """
    memory_length (`int`, defaults to 512):
        Tokens before its segment that a token sees in each layer as they were; at least `segment_length`.
    compressed_memory_length (`int`, defaults to 512):
        Slots before these that it sees, each made of tokens that have left the memory.
    compression_rate (`int`, defaults to 4):
        Tokens that become one slot: a divisor of `segment_length` and `memory_length`.
    compression (`str`, defaults to `"convolution"`):
        How: `"mean_pooling"`, `"max_pooling"`, `"convolution"` (kernel and stride are the rate),
        `"dilated_convolution"` (the rate is a power of 2) or `"most_used"`, which keeps those tokens that get the most
        attention by content from the segment at whose end they leave (`memory_length` is a multiple of
        `segment_length`).
    compression_loss_coef (`float`, defaults to 1.0):
        Weight of the attention-reconstruction loss, which trains the compression and nothing else, as the other loss
        does not train it. In training it is added to the loss over tokens where the compression has parameters.
    """

    model_type = "hf_arch_compressive_transformer"
    layer_kinds = ("compressive_recurrence",)

    compressed_memory_length: int = 512
    compression_rate: int = 4
    compression: Literal["mean_pooling", "max_pooling", "convolution", "dilated_convolution", "most_used"] = (
        "convolution"
    )
    compression_loss_coef: float | int = 1.0

    @property
    def span(self) -> int:
        return self.compressed_memory_length + self.window.span

    def validate_architecture(self):
        super().validate_architecture()
        rate, segment, memory = self.compression_rate, self.segment_length, self.memory_length
        for name in ("compressed_memory_length", "compression_rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("segment_length", "memory_length"):
            if getattr(self, name) % rate:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of compression_rate {rate}.")
        if memory < segment:
            raise ValueError(
                f"memory_length {memory} is less than segment_length {segment}: what leaves it was never in."
            )
        if self.compression == "dilated_convolution" and (rate < 2 or rate & (rate - 1)):
            raise ValueError(f"compression_rate {rate} is no power of 2: dilations double up to the rate.")
        if self.compression == "most_used" and memory % segment:
            raise ValueError(
                f"memory_length {memory} is not a multiple of segment_length {segment}: the most used are chosen among "
                "the tokens of a segment."
            )
        if self.compression_loss_coef < 0:
            raise ValueError(f"compression_loss_coef is {self.compression_loss_coef}; it must not be negative.")
