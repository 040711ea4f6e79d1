"""Mixture-of-Depths (Raposo et al., 2024, arXiv:2404.02258): layers that work on some of the tokens. And early exits
(Elbayad et al., 2020, arXiv:1910.10073; Schuster et al., 2022, arXiv:2207.07061): tokens that leave the stack.

In training a routed layer chooses the share of a document's tokens that its router ranks highest, which depends on
tokens to come: a loss in training says less of what the model will do than that of other decoders. In evaluation a
predictor decides token by token, and the model is causal.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, can_return_tuple

from ...layers.attention import Attention
from ...layers.early_exit import CarryingAttention, CarryingPreNorm, EarlyExitView, Exits
from ...layers.positions import RotaryEmbedding
from ...layers.routed_view import RoutedView
from ...layers.side_loss import LateLoss, SideLoss
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, CausalLMOutput, loss_and_logits
from ...skeleton.loss import LOGITS_AT_ONCE, share_of_batch, targets_of
from ...skeleton.masks import MASKS, number_documents
from .configuration_mixture_of_depths import ArchMixtureOfDepthsConfig


class ArchMixtureOfDepthsModel(Backbone):
    config: ArchMixtureOfDepthsConfig
    mixers = {
        "full_attention": Attention,
        "routed_attention": Attention,
        "early_exit_attention": CarryingAttention,
    }
    masks = {"routed_attention": number_documents, "early_exit_attention": MASKS["full_attention"]}
    views = {"routed_attention": RoutedView, "early_exit_attention": EarlyExitView}
    residual = CarryingPreNorm
    positions = RotaryEmbedding

    @functools.wraps(Backbone.forward)
    def forward(self, *args, **kwargs):
        if not self.training:
            kwargs.setdefault("exits", Exits())
        return super().forward(*args, **kwargs)

    @staticmethod
    def call_layer(layer, stream, *args, exits: Exits | None = None, **context):
        stream = layer(stream, *args, exits=exits, **context)
        if exits is not None and exits.loss is not None:
            exits.answers[context["layer_idx"]] = stream
        return stream


@dataclass
class DepthCausalLMOutput(CausalLMOutput):
    """`predictor_loss`, `exit_loss`: in training with labels, what predictors and classifiers lose, the mean of the
    binary cross-entropy over tokens, added up over the layers. `depths` [batch, length]: in evaluation, of how many
    layers of type early_exit_attention each token has been through."""

    predictor_loss: torch.FloatTensor | None = None
    exit_loss: torch.FloatTensor | None = None
    depths: torch.LongTensor | None = None


class ArchMixtureOfDepthsForCausalLM(CausalLM):
    config: ArchMixtureOfDepthsConfig
    backbone = ArchMixtureOfDepthsModel

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> DepthCausalLMOutput:
        """In training with labels predictors and classifiers learn, too: their loss is added to that over tokens, and
        trains nothing but them. With early exits the loss over tokens is a mean over all layers at which a token may
        leave, the i-th layer of the stack counting i times."""
        learning = self.training and labels is not None
        side_loss, exits = SideLoss() if learning else None, Exits(LateLoss() if learning else None)
        told = {"labels": labels, "use_cache": use_cache, "side_loss": side_loss, "return_dict": True} | kwargs
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = super().forward(*given, **told, **({} if self.training and not learning else {"exits": exits}))
        outputs = DepthCausalLMOutput(**outputs)
        if isinstance(exits.depths, torch.Tensor):
            outputs.depths = exits.depths
        if learning:
            targets = targets_of(labels, kwargs.get("shift_labels"), -100).view(labels.shape)
            weight = share_of_batch(labels, **kwargs) / (targets != -100).sum().clamp(min=1)
            if "early_exit_attention" in self.config.layer_types:
                self.learn_to_leave(outputs, exits, labels, targets, weight, kwargs)
            if "routed_attention" in self.config.layer_types:
                outputs.predictor_loss = side_loss.mean()
                outputs.loss = side_loss.join(outputs.loss, weight)
        return outputs

    def learn_to_leave(self, outputs, exits: Exits, labels, targets, weight, kwargs: dict) -> None:
        """Add to the outputs the losses of what would be named after each layer (CALM, equation 6), and of what its
        classifier says of that (section 4.3)."""
        *earlier, last = (i for i, kind in enumerate(self.config.layer_types) if kind == "early_exit_attention")
        whole = sum(range(1 + (earlier[0] if earlier else last), last + 2))
        outputs.loss = outputs.loss * ((last + 1) / whole)
        final, late = self.named(self.model.norm(exits.answers[last])), 0.0
        for layer_idx in earlier:
            hidden_states = self.model.norm(exits.answers[layer_idx])
            loss, _ = loss_and_logits(self, hidden_states, labels, 0, **kwargs)
            outputs.loss = outputs.loss + loss * ((layer_idx + 1) / whole)
            if layer_idx in exits.loss.said:
                same = (self.named(hidden_states) == final) & (targets != -100)
                said = exits.loss.said[layer_idx].squeeze(-1)
                each = F.binary_cross_entropy_with_logits(said, same.to(said.dtype), reduction="none")
                late = late + (each * (targets != -100)).sum()
        if exits.loss.said:
            outputs.exit_loss = late.detach() / (targets != -100).sum().clamp(min=1)
            outputs.loss = exits.loss.join(outputs.loss, late * weight)

    @torch.no_grad()
    def named(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, length] the likeliest tokens."""
        parts = hidden_states.flatten(0, 1).split(max(1, LOGITS_AT_ONCE // self.vocab_size))
        return torch.cat([self.lm_head(part).argmax(-1) for part in parts]).view(hidden_states.shape[:2])


def with_predictors(forward: Callable, by_document: bool) -> Callable:
    """The forward of another head, under which predictors learn. Classifiers of early exits stay as they are: what they
    ask is whether a layer would name the same token."""

    @can_return_tuple
    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        side_loss = SideLoss(by_document) if self.training else None
        outputs = forward(self, *args, side_loss=side_loss, **kwargs | {"return_dict": True})
        if side_loss is not None and side_loss.values and outputs.loss is not None:
            labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
            share = share_of_batch(labels, num_items_in_batch=items, shift_labels=labels)
            outputs.loss = side_loss.join(outputs.loss, share / next(iter(side_loss.counts.values())).clamp(min=1))
        return outputs

    return call


class ArchMixtureOfDepthsForSequenceClassification(SequenceClassification):
    config: ArchMixtureOfDepthsConfig
    backbone = ArchMixtureOfDepthsModel
    forward = with_predictors(SequenceClassification.forward, by_document=True)


class ArchMixtureOfDepthsForTokenClassification(TokenClassification):
    config: ArchMixtureOfDepthsConfig
    backbone = ArchMixtureOfDepthsModel
    forward = with_predictors(TokenClassification.forward, by_document=False)


class ArchMixtureOfDepthsForQuestionAnswering(QuestionAnswering):
    config: ArchMixtureOfDepthsConfig
    backbone = ArchMixtureOfDepthsModel
    forward = with_predictors(QuestionAnswering.forward, by_document=True)
