"""Mixture-of-Depths (Raposo et al., 2024, arXiv:2404.02258): layers that work on some of the tokens.

In training a layer chooses the share of a document's tokens that its router ranks highest, which depends on tokens to
come: a loss in training says a little less of what the model will do than that of other decoders. In evaluation a
predictor decides token by token, and the model is causal.
"""

from dataclasses import dataclass
from typing import Unpack

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import TransformersKwargs, can_return_tuple

from ...layers.attention import Attention
from ...layers.positions import RotaryEmbedding
from ...layers.routed_view import RoutedView
from ...layers.side_loss import SideLoss
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from ...skeleton.loss import share_of_batch, targets_of
from ...skeleton.masks import number_documents
from .configuration_mixture_of_depths import ArchMixtureOfDepthsConfig


class ArchMixtureOfDepthsModel(Backbone):
    config: ArchMixtureOfDepthsConfig
    mixers = {"full_attention": Attention, "routed_attention": Attention}
    masks = {"routed_attention": number_documents}
    views = {"routed_attention": RoutedView}
    positions = RotaryEmbedding


@dataclass
class DepthCausalLMOutput(MoeCausalLMOutputWithPast):
    """`predictor_loss`: in training with labels, the binary cross-entropy of the predictors, the sum over the layers."""

    predictor_loss: torch.FloatTensor | None = None


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
        """In training with labels the predictors learn, too: their loss is added to that over tokens, and trains nothing
        but them. Other heads leave them as they are."""
        side_loss = SideLoss() if self.training and labels is not None else None
        told = {"labels": labels, "use_cache": use_cache, "side_loss": side_loss, "return_dict": True} | kwargs
        outputs = super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **told)
        outputs = DepthCausalLMOutput(**outputs)
        if side_loss is not None:
            outputs.predictor_loss = side_loss.mean()
            named = (targets_of(labels, kwargs.get("shift_labels"), -100) != -100).sum().clamp(min=1)
            outputs.loss = side_loss.join(outputs.loss, share_of_batch(labels, **kwargs) / named)
        return outputs


class ArchMixtureOfDepthsForSequenceClassification(SequenceClassification):
    config: ArchMixtureOfDepthsConfig
    backbone = ArchMixtureOfDepthsModel


class ArchMixtureOfDepthsForTokenClassification(TokenClassification):
    config: ArchMixtureOfDepthsConfig
    backbone = ArchMixtureOfDepthsModel


class ArchMixtureOfDepthsForQuestionAnswering(QuestionAnswering):
    config: ArchMixtureOfDepthsConfig
    backbone = ArchMixtureOfDepthsModel
