"""Transformer-XL (Dai et al., 2019, arXiv:1901.02860)."""

from huggingface_hub.dataclasses import strict

from ...ops.segment_rows import Window
from ..configuration_segment_recurrence import SegmentRecurrenceConfig


@strict
class ArchTransformerXLConfig(SegmentRecurrenceConfig):
    """
    same_length (`bool`, defaults to `False`):
        Whether each token sees `memory_length` tokens before itself instead, wherever its segment begins.
    """

    model_type = "hf_arch_transformer_xl"
    layer_kinds = ("segment_recurrence",)

    same_length: bool = False

    @property
    def window(self) -> Window:
        return Window(self.segment_length, self.memory_length, self.same_length)
