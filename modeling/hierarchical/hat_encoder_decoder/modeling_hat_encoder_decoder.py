"""A HAT that reads a long document, and a decoder that writes of it: at each token it weighs the segments, and attends
to the tokens of the few that matter most (hierarchical attention: Nallapati et al., 2016, arXiv:1602.06023, section
2.4; of chosen sentences alone: Manakul and Gales, 2021, arXiv:2109.03888). A step costs by segments."""

import torch

from ...layers.attention import Attention, SlidingAttention
from ...layers.hierarchical_cross_attention import HierarchicalCrossAttention, SourceLayout, lay_out
from ...ops.documents import find_documents
from ...skeleton.conditional_generation import ConditionalGeneration
from ...skeleton.heads import also_named
from ...skeleton.laboratory import Laboratory
from ...skeleton.seq2seq import EncoderDecoder, EncoderOnly, check_source_mask, packed_pairs
from ..hat.modeling_hat import ArchHatModel
from .configuration_hat_encoder_decoder import ArchHatEncoderDecoderConfig

OF_SOURCE = ("encoder_outputs", "attention_mask", "position_ids", "segment_starts")


class ArchHatEncoderDecoderDecoder(Laboratory):
    config: ArchHatEncoderDecoderConfig
    mixers = {"full_attention": Attention, "sliding_attention": SlidingAttention}
    cross_attention = HierarchicalCrossAttention


class ArchHatEncoderDecoderModel(EncoderDecoder):
    """`segment_starts` as of `ArchHatModel`. The decoder may go on with several rows for each of the source: they share
    its keys."""

    config: ArchHatEncoderDecoderConfig
    encoder_backbone = ArchHatModel
    decoder_backbone = ArchHatEncoderDecoderDecoder
    forward = also_named(EncoderDecoder.forward, "segment_starts")

    def cross_context(
        self, encoded, queries, source: tuple, target: tuple, past_key_values, segment_starts=None, **kwargs
    ) -> dict:
        """Where the segments of the source are; nothing where the cache knows it."""
        if past_key_values is not None and past_key_values.is_updated.get(0):
            return {}
        check_source_mask(encoded, source[0])
        if queries.shape[0] % encoded.shape[0]:
            raise ValueError(
                f"The encoder answered {len(encoded)} rows, but the decoder is to go on with {len(queries)}: give as "
                "many, or as many for each."
            )
        text = self.encoder.segments_of(encoded, *source, segment_starts)
        token, sizes = lay_out(text, *encoded.shape[:2], encoded.device)
        packed = packed_pairs(self.config, encoded, queries, source, target, past_key_values)
        if packed is None and len(sizes) != len(encoded):
            raise ValueError(
                "position_ids tell packed documents of the source apart, of which each wants an answer of its own: "
                "give decoder_position_ids, and no past_key_values; or a row to each document."
            )
        asking = None if packed is None else find_documents(packed[1])
        row = torch.arange(len(sizes), device=encoded.device)
        if packed is None:
            row = row.repeat_interleave(queries.shape[0] // encoded.shape[0])
        return {"source_layout": SourceLayout(encoded.shape[1], token, sizes, row, asking)}


class ArchHatEncoderDecoderEncoderModel(EncoderOnly):
    config: ArchHatEncoderDecoderConfig
    encoder_backbone = ArchHatModel
    forward = also_named(EncoderOnly.forward, "segment_starts")


class ArchHatEncoderDecoderForConditionalGeneration(ConditionalGeneration):
    """Summaries of long documents, and whatever else is written of one.

    Example:

        >>> import torch
        >>> from hf_arch import find
        >>> row = find("hat_encoder_decoder")
        >>> config = row.load("Config")(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=1000,
        ...                             num_hidden_layers=2, encoder_num_hidden_layers=3)
        >>> model = row.load("ForConditionalGeneration")(config)
        >>> document = torch.randint(3, 1000, (1, 2000))
        >>> loss = model(input_ids=document, labels=torch.randint(3, 1000, (1, 30))).loss
        >>> model.eval().generate(document, num_beams=4, max_new_tokens=20, min_new_tokens=20).shape
        torch.Size([1, 21])
    """

    config: ArchHatEncoderDecoderConfig
    backbone = ArchHatEncoderDecoderModel
    forward = also_named(ConditionalGeneration.forward, "segment_starts")

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """generate() would copy the source for each beam: here they share it."""
        source = {name: model_kwargs.pop(name) for name in OF_SOURCE if name in model_kwargs}
        input_ids, expanded = super()._expand_inputs_for_generation(expand_size, False, input_ids, **model_kwargs)
        return input_ids, expanded | source
