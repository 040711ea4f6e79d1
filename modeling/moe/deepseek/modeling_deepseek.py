"""DeepSeek-V2 and V3 (DeepSeek-AI, 2024, arXiv:2405.04434 and arXiv:2412.19437): a decoder that remembers a latent of
each token, with sparse feed-forwards of many small experts."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from ...layers.latent_attention import LatentAttention
from ...layers.positions import RotaryEmbedding
from ...layers.side_loss import SideLoss
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, loss_and_logits
from ...skeleton.loss import next_tokens, per_label
from ...skeleton.masks import count_positions, number_documents
from .configuration_deepseek import ArchDeepSeekConfig
from .sparse_deepseek import DeepSeekFeedForward, FurtherToken


class ArchDeepSeekModel(Backbone):
    config: ArchDeepSeekConfig
    mixers = {"latent_attention": LatentAttention}
    feed_forwards = Backbone.feed_forwards | {"sparse": DeepSeekFeedForward}
    positions = RotaryEmbedding
    _keep_in_fp32_modules_strict = ["router.bias"]
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)mtp\."]  # of a model that names further tokens


class ArchDeepSeekForCausalLM(CausalLM):
    config: ArchDeepSeekConfig
    backbone = ArchDeepSeekModel

    def add_head(self, config):
        super().add_head(config)
        if config.num_nextn_predict_layers:  # part of the stack, but of no other head's
            self.model.mtp = nn.ModuleList(FurtherToken(self.model) for _ in range(config.num_nextn_predict_layers))

    def further_context(self):
        asked = self.config.sequence_balance_coef and self.config.has_experts
        return {"side_loss": SideLoss()} if asked else {}

    def with_further_losses(self, loss, hidden_states, labels, *read, side_loss=None, **kwargs):
        """Those of further tokens, and of experts that are unequally busy in a document."""
        if self.config.num_nextn_predict_layers:
            further = self.losses_of_further_tokens(hidden_states, labels, *read, side_loss=side_loss, **kwargs)
            loss = loss + self.config.mtp_loss_coef * sum(further) / len(further)
        if side_loss is None:
            return loss
        return side_loss.join(loss, self.config.sequence_balance_coef * per_label(labels, **kwargs))

    def losses_of_further_tokens(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> list[torch.Tensor]:
        """Of each further layer, which reads what the one before answers and the embedding of one token later. Nothing
        of another document is named."""
        model, config = self.model, self.config
        embeddings = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else attention_mask[:, -hidden_states.shape[1] :]
        masks = model.make_masks(embeddings, mask, None, position_ids)
        documents = number_documents(config, embeddings, mask, None, position_ids)
        positions = count_positions(embeddings, mask) if position_ids is None else position_ids
        kwargs["position_embeddings"] = model.embed_positions(embeddings, positions)[1]
        targets, losses = next_tokens(labels) if shift_labels is None else shift_labels, []
        later = None if documents is None else next_tokens(documents, 0)
        for number, layer in enumerate(model.mtp, start=config.num_hidden_layers):
            embeddings, targets = F.pad(embeddings[:, 1:], (0, 0, 0, 1)), next_tokens(targets)
            if documents is not None:
                later = next_tokens(later, 0)
                targets = targets.masked_fill(later != documents, -100)
            told = {"attention_mask": masks[config.layer_types[-1]], "documents": documents, "layer_idx": number}
            hidden_states = layer(hidden_states, embeddings, **told, **kwargs)
            told = kwargs | {"shift_labels": targets.contiguous()}
            losses.append(loss_and_logits(self, hidden_states, labels, 0, **told)[0])
        return losses


class ArchDeepSeekForSequenceClassification(SequenceClassification):
    config: ArchDeepSeekConfig
    backbone = ArchDeepSeekModel


class ArchDeepSeekForTokenClassification(TokenClassification):
    config: ArchDeepSeekConfig
    backbone = ArchDeepSeekModel


class ArchDeepSeekForQuestionAnswering(QuestionAnswering):
    config: ArchDeepSeekConfig
    backbone = ArchDeepSeekModel
