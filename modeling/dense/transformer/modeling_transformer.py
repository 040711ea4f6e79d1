"""The Transformer (Vaswani et al., 2017, arXiv:1706.03762) and the choices that later models made in it."""

from typing import Unpack

import torch
from transformers.utils import TransformersKwargs

from ...layers.attention import Attention, BidirectionalAttention, SlidingAttention
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, MaskedLM
from ...skeleton.laboratory import Laboratory
from .configuration_transformer import ArchTransformerConfig


class ArchTransformerModel(Laboratory):
    config: ArchTransformerConfig
    mixers = {
        "full_attention": Attention,
        "sliding_attention": SlidingAttention,
        "bidirectional_attention": BidirectionalAttention,
    }

    def make_masks(
        self,
        inputs_embeds,
        attention_mask,
        past_key_values,
        position_ids,
        prefix_length: int | torch.Tensor | None = None,
        prefix_mask: torch.Tensor | None = None,
        **context,
    ):
        """`prefix_length` (a number, or one per row [batch], in real tokens) or `prefix_mask` [batch, length]: the
        tokens at the start that see each other both ways."""
        if prefix_length is None and prefix_mask is None or isinstance(attention_mask, dict):
            return super().make_masks(inputs_embeds, attention_mask, past_key_values, position_ids, **context)
        if self.config.direction != "prefix":
            raise ValueError(f"A prefix needs direction='prefix'; this model is {self.config.direction}.")
        batch, length = inputs_embeds.shape[:2]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        real = attention_mask if attention_mask is not None else inputs_embeds.new_ones(batch, seen + length)
        if prefix_mask is None:
            limit = torch.as_tensor(prefix_length, device=real.device).reshape(-1, 1)
            prefix_mask = real.long().cumsum(-1) <= limit
        prefix_mask = prefix_mask.bool() & real[:, : prefix_mask.shape[1]].bool()
        if prefix_mask[:, seen:].any() and seen:
            raise ValueError("The prefix sees itself both ways: give it in one piece, without a cache before it.")
        return super().make_masks(
            inputs_embeds, attention_mask, past_key_values, position_ids, prefix=prefix_mask, **context
        )


class ArchTransformerForCausalLM(CausalLM):
    config: ArchTransformerConfig
    backbone = ArchTransformerModel

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        token_type_ids=None,
        prefix_length=None,
        prefix_mask=None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """generate() and the Trainer hand over what is named here, and nothing else."""
        prefix = {"prefix_length": prefix_length, "prefix_mask": prefix_mask}
        kwargs |= {name: value for name, value in prefix.items() if value is not None}
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache)
        return super().forward(*given, logits_to_keep, token_type_ids, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        prefix_length=None,
        prefix_mask=None,
        **kwargs,
    ):
        """generate() makes the masks of a static cache before the call: the prefix belongs into them."""
        given = (input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, is_first_iteration)
        inputs = super().prepare_inputs_for_generation(*given, **kwargs)
        told = {"prefix_length": prefix_length, "prefix_mask": prefix_mask}
        prefix = {name: value for name, value in told.items() if value is not None}
        if prefix and isinstance(inputs.get("attention_mask"), dict):
            tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"][..., 0]
            like = torch.empty(*tokens.shape, 0, dtype=self.dtype, device=tokens.device)
            masks = self.model.make_masks(like, attention_mask, past_key_values, inputs.get("position_ids"), **prefix)
            inputs["attention_mask"] = {kind: mask.contiguous() for kind, mask in masks.items()}
        return inputs | prefix


class ArchTransformerForMaskedLM(MaskedLM):
    config: ArchTransformerConfig
    backbone = ArchTransformerModel


class ArchTransformerForSequenceClassification(SequenceClassification):
    config: ArchTransformerConfig
    backbone = ArchTransformerModel


class ArchTransformerForTokenClassification(TokenClassification):
    config: ArchTransformerConfig
    backbone = ArchTransformerModel


class ArchTransformerForQuestionAnswering(QuestionAnswering):
    config: ArchTransformerConfig
    backbone = ArchTransformerModel
