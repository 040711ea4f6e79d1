"""An encoder, and a decoder whose layers also attend to what the encoder answered (Vaswani et al., 2017, section 3.1).

Both are backbones: the decoder is one that has a `cross_attention`, and the config tells them apart by `stack(name)`.
"""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqMoEModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing

from ..ops.documents import document_numbers
from .backbone import Backbone
from .config import ArchConfig
from .masks import number_documents, several
from .pretrained import ArchPreTrainedModel


class EncoderOnly(ArchPreTrainedModel):
    """The encoder of an encoder-decoder, by itself."""

    encoder_backbone: ClassVar[type[Backbone]]
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)decoder\.", r"^lm_head\."]

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        self.encoder = self.encoder_backbone(config.stack("encoder"))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        share_embeddings(value, self.encoder)

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        return self.encoder(input_ids, attention_mask, position_ids, **kwargs)


@dataclass
class EncoderDecoderOutput(Seq2SeqMoEModelOutput):
    """`encoder_router_choices`, `decoder_router_choices`: as `CausalLMOutput.router_choices`, of each stack."""

    encoder_router_choices: tuple[torch.LongTensor, ...] | None = None
    decoder_router_choices: tuple[torch.LongTensor, ...] | None = None


class EncoderDecoder(ArchPreTrainedModel):
    """Both stacks, with one table of embeddings."""

    encoder_backbone: ClassVar[type[Backbone]]
    decoder_backbone: ClassVar[type[Backbone]]
    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        if not config.is_encoder_decoder:
            raise ValueError("The config is of one stack alone (is_encoder_decoder=False): this model has two.")
        self.encoder = self.encoder_backbone(config.stack("encoder"))
        self.decoder = self.decoder_backbone(config.stack("decoder"))
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict:
        """`tie_word_embeddings` is about the head: the stacks share their embeddings always."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        share_embeddings(value, self.encoder, self.decoder)

    @can_return_tuple
    @merge_with_config_defaults
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
        use_cache: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EncoderDecoderOutput:
        """
        decoder_input_ids (`torch.LongTensor` [batch, length], *optional*):
            By default the decoder reads the source, moved one to the right, as in BART (arXiv:1910.13461). Not in
            training, where it would be a mistake: a Trainer that smooths labels does not hand them over.
        encoder_outputs (*optional*):
            What the encoder answered, if it was asked before; the hidden states [batch, length, size] come first.
        position_ids, decoder_position_ids (*optional*):
            Where they restart, a document begins: the n-th of the decoder attends to the n-th of the encoder.
        """
        if encoder_outputs is None:
            told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
            encoder_outputs = self.encoder(input_ids, attention_mask, position_ids, **told, **kwargs)
        elif not isinstance(encoder_outputs, dict):
            names = ("last_hidden_state", "hidden_states", "attentions")
            encoder_outputs = BaseModelOutput(**dict(zip(names, encoder_outputs, strict=False)))
        encoded = encoder_outputs["last_hidden_state"]
        told = decoder_input_ids is not None or decoder_inputs_embeds is not None
        if not told and input_ids is not None and not self.training:
            decoder_input_ids = self.shifted(input_ids)
        check_decoder_call(decoder_input_ids, decoder_inputs_embeds, past_key_values)
        queries = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        source, target = (attention_mask, position_ids), (decoder_attention_mask, decoder_position_ids)
        kwargs |= self.cross_context(encoded, queries, source, target, past_key_values, **kwargs)
        answer = (decoder_input_ids, *target)
        outputs, cache = self.decode(answer, past_key_values, use_cache, encoded, decoder_inputs_embeds, **kwargs)
        return EncoderDecoderOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=cache,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            decoder_router_logits=outputs.router_logits,
            decoder_router_choices=outputs.get("router_choices"),
            cross_attentions=outputs.get("cross_attentions"),
            encoder_last_hidden_state=encoded,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            encoder_router_logits=encoder_outputs.get("router_logits"),
            encoder_router_choices=encoder_outputs.get("router_choices"),
        )

    def cross_context(
        self, encoded: torch.Tensor, queries: torch.Tensor, source: tuple, target: tuple, past_key_values, **kwargs
    ) -> dict:
        """What cross-attention is told beside the encoder's answer; source, target: the mask and the position ids of
        each, or None. Raises ValueError where they do not fit."""
        check_source(encoded, source[0], queries)
        mask = cross_mask(self.config, encoded, queries, source, target, past_key_values)
        return {"encoder_attention_mask": mask}

    def decode(self, answer: tuple, past_key_values, use_cache: bool, encoded: torch.Tensor, inputs_embeds, **kwargs):
        """What the decoder says to `answer` (ids, mask, position ids), and both caches. It makes its own, after its
        masks, in which packed documents are looked for only where there is none."""
        caching = use_cache and past_key_values is None and not self.training
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if caching else past_key_values
        replayed = self.training and self.decoder.gradient_checkpointing  # a layer is called twice: it keeps nothing
        outputs = self.decoder(
            *answer,
            None if past_key_values is None else past_key_values.self_attention_cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            encoder_hidden_states=encoded,
            cross_cache=None if replayed else cache,
            **kwargs,
        )
        if caching:
            cache.self_attention_cache = outputs.past_key_values
        return outputs, cache

    def shifted(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """tokens [batch, length] moved one to the right, behind the start token, with padding for -100."""
        start = torch.full_like(tokens[:, :1], self.config.decoder_start_token_id)
        return torch.cat((start, tokens[:, :-1].masked_fill(tokens[:, :-1] == -100, self.config.pad_token_id)), dim=1)


def share_embeddings(value: nn.Module, *stacks: Backbone) -> None:
    """Give the stacks one table of embeddings."""
    for stack in stacks:
        stack.embed_tokens, stack.config.vocab_size = value, len(value.weight)


def check_decoder_call(decoder_input_ids, decoder_inputs_embeds, past_key_values) -> None:
    if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
        raise ValueError(
            "Give exactly one of decoder_input_ids and decoder_inputs_embeds, or, to a model with a loss, labels."
        )
    if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}: it is of another model, since an encoder-decoder "
            "keeps two. Give none, or EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())."
        )


def check_source(encoded: torch.Tensor, attention_mask: torch.Tensor | None, queries: torch.Tensor) -> None:
    if encoded.shape[0] != queries.shape[0]:
        raise ValueError(f"The encoder answered {len(encoded)} rows, but the decoder is to go on with {len(queries)}.")
    check_source_mask(encoded, attention_mask)


def check_source_mask(encoded: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None and attention_mask.shape != encoded.shape[:2]:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, but the encoder's answer {list(encoded.shape[:2])}: "
            "the mask is that of the source, decoder_attention_mask that of the decoder's input."
        )


def cross_mask(config, encoded: torch.Tensor, queries: torch.Tensor, source: tuple, target: tuple, past_key_values):
    """Every query sees what is real in the source, or, in packed rows, in its own document of it.

    source, target: the mask and the position ids of each, or None.
    """
    pattern = {}
    packed = packed_pairs(config, encoded, queries, source, target, past_key_values)
    if packed is not None:
        of_source, of_target = packed
        # padding among the queries sees all, so that no row of the mask is empty
        pattern["and_mask_function"] = lambda batch, head, query, key: (
            (of_target[batch, query] == of_source[batch, key]) | (of_target[batch, query] == 0)
        )
    like = encoded.new_empty(*queries.shape[:2], 0)
    return create_bidirectional_mask(config, like, source[0], encoder_hidden_states=encoded, **pattern)


def packed_pairs(
    config, encoded: torch.Tensor, queries: torch.Tensor, source: tuple, target: tuple, past_key_values
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The numbers of documents, as in `number_documents`, of the source and of what is asked, where rows are packed."""
    if past_key_values is not None or source[1] is None and target[1] is None:
        return None
    found = [
        number_documents(config, tokens, mask, None, position_ids)
        for tokens, (mask, position_ids) in ((encoded, source), (queries, target))
    ]
    if not any(several(numbers) for numbers in found):
        return None
    of_source, of_target = map(document_numbers, found, (encoded, queries))
    if not is_tracing(of_source) and not torch.equal(of_source.amax(-1), of_target.amax(-1)):
        raise ValueError(
            "Packed rows hold as many documents for the encoder as for the decoder: give position_ids and "
            "decoder_position_ids that restart at each."
        )
    return of_source, of_target
