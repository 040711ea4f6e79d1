"""A backbone and a head for a task."""

from typing import ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MoeCausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from ..layers.cache import growing
from .backbone import Backbone
from .config import ArchConfig
from .loss import LOGITS_AT_ONCE, chunked_cross_entropy
from .pretrained import ArchPreTrainedModel


class Head(ArchPreTrainedModel):
    """What the heads share: `self.model` is the backbone, `add_head` builds the rest."""

    backbone: ClassVar[type[Backbone]]

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        self.model = self.backbone(config)
        self.add_head(config)
        self.post_init()

    def add_head(self, config: ArchConfig) -> None:
        raise NotImplementedError


class CausalLM(Head, GenerationMixin):
    """A head that names the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def add_head(self, config):
        if config.pooling != "last":
            raise ValueError(
                "A model that sees the future cannot name the next token: take ForMaskedLM, or a causal one."
            )
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """
        labels (`torch.LongTensor` [batch, length], *optional*):
            The tokens themselves (they are shifted here), -100 where nothing is asked. In training, when all logits
            would be more than 2^24 numbers, the loss is made without them and `logits` is None.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        check_labels(labels, hidden_states)
        if labels is not None and self.training and hidden_states[..., 0].numel() * self.vocab_size > LOGITS_AT_ONCE:
            loss = chunked_cross_entropy(hidden_states, self.lm_head, labels, **kwargs)
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        """generate() makes the cache; its layers are ours where transformers' would copy everything at every step."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        made = model_kwargs.get("past_key_values")
        if given is None and generation_config.cache_implementation in (None, "dynamic") and made is not None:
            growing(made)

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ):
        """Called by generate() with a static cache, which must not see the mask grow."""
        return self.model.make_masks(inputs_embeds, attention_mask, past_key_values, position_ids)


class MaskedLMHead(nn.Module):
    """decoder(norm(act(dense(x)))): BERT, RoBERTa."""

    def __init__(self, config: ArchConfig, norm: nn.Module):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = norm
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.act_fn(self.dense(hidden_states))))


class MaskedLM(Head):
    """A head that names the hidden tokens."""

    _tied_weights_keys = {"lm_head.decoder.weight": "model.embed_tokens.weight"}

    def add_head(self, config):
        if config.pooling != "first":
            raise ValueError("A masked token is read from both sides: this model is causal. Take ForCausalLM.")
        self.lm_head = MaskedLMHead(config, self.model.make_norm())

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, **kwargs
    ) -> MaskedLMOutput:
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        check_labels(labels, outputs.last_hidden_state)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LastToken(nn.Module):
    """The last real token of each row, which in a decoder has seen the others."""

    def __init__(self, config: ArchConfig):
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        if real is None:
            return hidden_states[:, -1]
        last = (torch.arange(real.shape[1], device=real.device) * real).argmax(-1)
        return hidden_states[torch.arange(len(real), device=real.device), last]


class FirstToken(nn.Module):
    """tanh(dense(x)) of the first real token of each row, as BERT and RoBERTa pool."""

    def __init__(self, config: ArchConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        first = 0 if real is None else real.int().argmax(-1)
        return torch.tanh(
            self.dense(hidden_states[torch.arange(len(hidden_states), device=hidden_states.device), first])
        )


class SequenceClassification(Head):
    """A head that names the whole text, or scores it."""

    poolers: ClassVar[dict[str, type[nn.Module]]] = {"last": LastToken, "first": FirstToken}

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.pooler = self.poolers[config.pooling](config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, **kwargs
    ) -> SequenceClassifierOutputWithPast:
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        real = attention_mask
        if real is None and input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        logits = self.score(self.dropout(self.pooler(outputs.last_hidden_state, real)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TokenClassification(Head):
    """A head that names every token."""

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, **kwargs
    ) -> TokenClassifierOutput:
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        check_labels(labels, outputs.last_hidden_state)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class QuestionAnswering(Head):
    """A head that finds where an answer starts and ends."""

    def add_head(self, config):
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        start_logits, end_logits = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def check_labels(labels: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
    if labels is not None and labels.shape != hidden_states.shape[:2]:
        raise ValueError(f"labels are {list(labels.shape)}, but the tokens {list(hidden_states.shape[:2])}.")
