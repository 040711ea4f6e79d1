"""Heads over the segments of a text: one that scores each of them, one that learns from hidden ones."""

from dataclasses import dataclass
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from ..skeleton.heads import Head, MaskedLM

TEMPERATURE = 0.05  # of cosines, as in SimCSE (Gao et al., 2021, arXiv:2104.08821)


@dataclass
class SegmentClassifierOutput(ModelOutput):
    """logits [documents, segments, labels], and segment_mask [documents, segments]: 1 where there is a segment."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    segment_mask: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class SegmentClassification(Head):
    """A head that names every segment, or scores it: key sentences, extractive summaries (BERTSum: Liu and Lapata,
    2019, arXiv:1908.08345)."""

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
        segment_starts=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SegmentClassifierOutput:
        """
        labels (`torch.Tensor` [documents, segments], *optional*):
            The class of each segment of level 0, or with one label (`num_labels=1`) how likely it is to be chosen, 0 to
            1; -100 where nothing is asked and past the last segment of a document.
        """
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids, "segment_starts": segment_starts}
        outputs = self.model(input_ids, attention_mask, position_ids, **told, **kwargs)
        logits = self.score(self.dropout(outputs.segment_embeddings))
        loss = None
        if labels is not None:
            check_segment_labels(labels, outputs.segment_mask)
            loss = segment_loss(logits, labels, kwargs.get("num_items_in_batch"))
            loss, _ = self.with_routing(loss, outputs, labels, **kwargs | {"shift_labels": labels})
        return SegmentClassifierOutput(
            loss=loss,
            logits=logits,
            segment_mask=outputs.segment_mask,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def check_segment_labels(labels: torch.Tensor, segment_mask: torch.Tensor) -> None:
    if labels.shape != segment_mask.shape:
        raise ValueError(
            f"labels are {list(labels.shape)}, but the segments {list(segment_mask.shape)}: one for each segment of a "
            "document, -100 past its last."
        )


def segment_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """The mean over labelled segments, or their sum over `num_items_in_batch`."""
    asked = labels != -100
    logits, labels = logits[asked], labels[asked].to(logits.device)
    if logits.shape[-1] == 1:
        total = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="sum")
    else:
        total = F.cross_entropy(logits, labels.long(), reduction="sum")
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else max(count, 1))


@dataclass
class SegmentPreTrainingOutput(ModelOutput):
    """logits [batch, length, vocabulary]; segment_logits [hidden, hidden]: how well each hidden segment, as foretold,
    fits each as it was read, that of its own place on the diagonal. loss = token_loss + segment_loss."""

    loss: torch.FloatTensor | None = None
    token_loss: torch.FloatTensor | None = None
    segment_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    segment_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class SegmentPreTraining(MaskedLM):
    """A head that names hidden tokens, and foretells hidden segments: SMITH's masked sentence blocks (Yang et al.,
    2020, arXiv:2004.12297) in segments whose tokens are hidden as in HIBERT (Zhang et al., 2019,
    arXiv:1905.06566).

    What a hidden segment's leader has learned of it from the others, times a matrix, should be more like what the model
    makes of that segment read alone than of any other that is hidden in the batch: cross-entropy of
    cos(foretold_i, read_j) / 0.05 over j. Segments of the very same tokens do not count against each other.
    """

    def add_head(self, config):
        super().add_head(config)
        self.loss_type = "ForMaskedLM"  # which transformers tells by the name of a class
        self.foretell = nn.Linear(config.output_size, config.output_size)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        token_type_ids=None,
        segment_starts=None,
        original_ids=None,
        hidden_segments=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SegmentPreTrainingOutput:
        """
        hidden_segments (`torch.LongTensor` [batch, length], *optional*):
            1 at the first token of each segment of level 0 that is hidden. There is no segment loss without it.
        original_ids (`torch.LongTensor` [batch, length], *optional*):
            The tokens before any were hidden. Both are made by `hf_arch.SentenceMaskCollator`.
        """
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids, "segment_starts": segment_starts}
        outputs = self.model(input_ids, attention_mask, position_ids, **told, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        token_loss = segment_loss = segment_logits = loss = None
        if hidden_segments is not None:
            if original_ids is None:
                raise ValueError("hidden_segments are told without original_ids, the tokens that they had.")
            text = self.model.segments_of(original_ids, attention_mask, position_ids, segment_starts)
            hidden = text.first(0).unpack(hidden_segments)[:, 0].bool()
            read, same = self.read_alone(text.members(0), original_ids, hidden)
            foretold = self.foretell(text.first(0).unpack(outputs.last_hidden_state)[hidden, 0])
            cosines = F.normalize(foretold, dim=-1) @ F.normalize(read, dim=-1).T
            segment_logits = (cosines / TEMPERATURE).masked_fill(same, torch.finfo(cosines.dtype).min)
            places = torch.arange(len(segment_logits), device=segment_logits.device)
            segment_loss = F.cross_entropy(segment_logits, places, reduction="sum") / max(len(places), 1)
        if labels is not None:
            token_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = token_loss + 0.0 * self.foretell(outputs.last_hidden_state[:, 0]).sum()
            loss = loss if segment_loss is None else loss + segment_loss
            loss, _ = self.with_routing(loss, outputs, labels, **kwargs | {"shift_labels": labels})
        return SegmentPreTrainingOutput(
            loss=loss,
            token_loss=token_loss,
            segment_loss=segment_loss,
            logits=logits,
            segment_logits=segment_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def read_alone(self, members, original_ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model makes of each hidden segment as a text of its own [hidden, size], and which of them are the
        same as another [hidden, hidden]."""
        rows, real = members.unpack(original_ids)[hidden], members.real
        if not len(rows):
            nothing = self.foretell.weight.new_zeros(0, self.foretell.in_features)
            return nothing, torch.zeros(0, 0, dtype=torch.bool, device=rows.device)
        real = torch.ones_like(rows, dtype=torch.bool) if real is None else real[hidden]
        starts = torch.zeros_like(rows)
        starts[:, 0] = 1
        read = self.model(rows, attention_mask=real.long(), segment_starts=starts).segment_embeddings[:, 0]
        tokens = rows.masked_fill(~real, -1)
        same = (tokens[:, None] == tokens[None]).all(dim=-1)
        return read, same.fill_diagonal_(False)
