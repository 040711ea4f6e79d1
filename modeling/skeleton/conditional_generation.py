"""An encoder-decoder and a head that names the next token of the answer."""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqMoEOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from ..layers.cache import growing
from .heads import Head, add_routing, loss_and_logits
from .loss import share_of_batch
from .masks import count_positions
from .seq2seq import EncoderDecoder


@dataclass
class ConditionalGenerationOutput(Seq2SeqMoEOutput):
    """The same, and `aux_loss`, which keeps the experts of each stack equally busy."""

    aux_loss: torch.FloatTensor | None = None
    encoder_router_choices: tuple[torch.LongTensor, ...] | None = None
    decoder_router_choices: tuple[torch.LongTensor, ...] | None = None


class ConditionalGeneration(Head, GenerationMixin):
    """An encoder-decoder and a head that names the next token of the answer."""

    backbone: ClassVar[type[EncoderDecoder]]
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def add_head(self, config):
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.LongTensor | None = None,
        return_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConditionalGenerationOutput:
        """
        labels (`torch.LongTensor` [batch, length], *optional*):
            The answer, -100 where nothing is asked. Without an input of its own the decoder reads them moved one to the
            right, and where it has experts, what follows the last label is padding to them. In training, when all
            logits would be more than 2^24 numbers, the loss is made without them and `logits` is None, unless
            `return_logits` asks for them.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        answer = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        if labels is not None and decoder_attention_mask is None and self.model.decoder.reads_documents:
            decoder_attention_mask = up_to_the_last(labels) if labels.shape == answer.shape[:2] else None
        items = kwargs.pop("num_items_in_batch", None)
        source = (input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs)
        told = (past_key_values, inputs_embeds, decoder_inputs_embeds, use_cache, position_ids, decoder_position_ids)
        outputs = self.model(*source, *told, token_type_ids, **kwargs)
        if labels is not None:  # the decoder's input is what is shifted
            kwargs |= {"num_items_in_batch": items, "shift_labels": labels.contiguous()}
        asked = (labels, logits_to_keep, return_logits)
        loss, logits = loss_and_logits(self, outputs.last_hidden_state, *asked, **kwargs)
        stacks = (("encoder", self.model.encoder), ("decoder", self.model.decoder))
        routed = [
            (stack, outputs.get(f"{name}_router_logits"), outputs.get(f"{name}_router_choices"))
            for name, stack in stacks
        ]
        loss, aux_loss = add_routing(loss, share_of_batch(labels, **kwargs), *routed)
        told = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return ConditionalGenerationOutput(loss=loss, logits=logits, aux_loss=aux_loss, **told)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """What the decoder reads to name the labels [batch, length]."""
        return self.model.shifted(labels)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        """generate() makes both caches of the decoder's layer types, but neither a state nor a window can hold the
        source: the cross-attention's grows, once."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        made = model_kwargs.get("past_key_values")
        if given is None and made is not None:
            if generation_config.cache_implementation in (None, "dynamic"):
                growing(made.self_attention_cache)
            model_kwargs["past_key_values"] = EncoderDecoderCache(made.self_attention_cache, DynamicCache())

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ):
        """Called by generate() with a static cache, which must not see the mask grow; it tells no positions, and only
        the mask knows them."""
        cache: Cache = past_key_values.self_attention_cache
        masks = self.model.decoder.make_masks(inputs_embeds, attention_mask, cache, position_ids)
        return masks | {"position_ids": count_positions(inputs_embeds, attention_mask, cache)}


def up_to_the_last(labels: torch.LongTensor) -> torch.Tensor:
    """labels [batch, length] -> [batch, length] (0 or 1), 0 behind the last that is not -100. Collators pad labels, and
    hand over no mask of the answer, as attention needs none: but experts have room for so many real tokens."""
    named = (labels != -100).long().flip(1).cumsum(1).flip(1).clamp(max=1)
    named[:, 0] = 1
    return named
