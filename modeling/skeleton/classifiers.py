"""A backbone and a head that names texts, tokens, or a stretch of tokens, or chooses among texts."""

from typing import ClassVar, Unpack

import torch
from torch import nn
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import (
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import TransformersKwargs, can_return_tuple

from .config import ArchConfig
from .heads import Head, check_labels


class LastToken(nn.Module):
    """The last real token of each row, which in a decoder has seen the others."""

    def __init__(self, config: ArchConfig):
        super().__init__()

    def forward(self, outputs: ModelOutput, real: torch.Tensor | None) -> torch.Tensor:
        hidden_states = outputs.last_hidden_state
        if real is None:
            return hidden_states[:, -1]
        last = (torch.arange(real.shape[1], device=real.device) * real).argmax(-1)
        return hidden_states[torch.arange(len(real), device=real.device), last]


class FirstToken(nn.Module):
    """tanh(dense(x)) of the first real token of each row, as BERT and RoBERTa pool."""

    def __init__(self, config: ArchConfig):
        super().__init__()
        self.dense = nn.Linear(config.output_size, config.output_size)

    def forward(self, outputs: ModelOutput, real: torch.Tensor | None) -> torch.Tensor:
        hidden_states = outputs.last_hidden_state
        first = 0 if real is None else real.int().argmax(-1)
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        return torch.tanh(self.dense(hidden_states[rows, first]))


class Document(FirstToken):
    """tanh(dense(x)) of what the backbone itself says of each document."""

    def forward(self, outputs: ModelOutput, real: torch.Tensor | None) -> torch.Tensor:
        return torch.tanh(self.dense(outputs.pooler_output))


class DocumentVector(nn.Module):
    """What the backbone itself says of each document, as it is."""

    def __init__(self, config: ArchConfig):
        super().__init__()

    def forward(self, outputs: ModelOutput, real: torch.Tensor | None) -> torch.Tensor:
        return outputs.pooler_output


class TextHead(Head):
    """A head that scores whole texts."""

    poolers: ClassVar[dict[str, type[nn.Module]]] = {
        "last": LastToken,
        "first": FirstToken,
        "document": Document,
        "document_vector": DocumentVector,
    }

    def add_scores(self, config: ArchConfig, count: int, bias: bool = True) -> None:
        self.pooler = self.poolers[config.pooling](config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.output_size, count, bias=bias)

    def scores(self, outputs: ModelOutput, input_ids, attention_mask) -> torch.Tensor:
        """[batch, scores]"""
        real = attention_mask
        if real is None and input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        return self.score(self.dropout(self.pooler(outputs, real)))


class SequenceClassification(TextHead):
    """A head that names the whole text, or scores it."""

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.add_scores(config, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        token_type_ids=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        outputs = self.model(input_ids, attention_mask, position_ids, **told, **kwargs)
        logits = self.scores(outputs, input_ids, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            loss, _ = self.with_routing(loss, outputs, labels, **kwargs | {"shift_labels": labels})
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MultipleChoice(TextHead):
    """A head that chooses among texts: all arguments are [batch, choices, length], labels [batch]."""

    of_batch: ClassVar[tuple[str, ...]] = ()  # but for these, which are of all texts one after another

    def add_head(self, config):
        self.add_scores(config, 1, bias=False)  # what all choices have in common chooses none

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        token_type_ids=None,
        num_items_in_batch=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        told = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        told |= {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids} | kwargs
        texts = input_ids if inputs_embeds is None else inputs_embeds
        if texts is not None and texts.ndim != 3 + (inputs_embeds is not None):
            raise ValueError(f"Expected [batch, choices, length], not {list(texts.shape)}: give the choices of a row.")
        flat = {
            name: x.flatten(0, 1) if isinstance(x, torch.Tensor) and x.ndim > 2 and name not in self.of_batch else x
            for name, x in told.items()
        }
        outputs = self.model(**flat)
        logits = self.scores(outputs, flat["input_ids"], flat["attention_mask"]).view(texts.shape[:2])
        loss = None
        if labels is not None:
            counted = {"num_items_in_batch": num_items_in_batch}
            loss = fixed_cross_entropy(logits, labels, **counted)
            loss, _ = self.with_routing(loss, outputs, labels, shift_labels=labels, **counted)
        return MultipleChoiceModelOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TokenClassification(Head):
    """A head that names every token."""

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.output_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        token_type_ids=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        outputs = self.model(input_ids, attention_mask, position_ids, **told, **kwargs)
        check_labels(labels, outputs.last_hidden_state)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
            loss, _ = self.with_routing(loss, outputs, labels, **kwargs | {"shift_labels": labels})
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class QuestionAnswering(Head):
    """A head that finds where an answer starts and ends."""

    def add_head(self, config):
        self.qa_outputs = nn.Linear(config.output_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        token_type_ids=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        outputs = self.model(input_ids, attention_mask, position_ids, **told, **kwargs)
        start_logits, end_logits = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
            loss, _ = self.with_routing(loss, outputs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
