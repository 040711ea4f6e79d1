"""Performer (Choromanski et al., 2020, arXiv:2009.14794): a Transformer whose attention is linear in the length, since
the exponential of a query and a key is, on average, a product of random features."""

import torch
from transformers.cache_utils import Cache

from ...layers.attention import Attention
from ...layers.cache import RecurrentCacheLayer
from ...layers.mixer import PIECE, carry_on, in_pieces
from ...layers.random_features import FEATURES
from ...ops.documents import find_documents
from ...ops.linear_attention import ask_keys, chunk_linear_attention, gather_keys, recurrent_linear_attention
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, MaskedLM
from ...skeleton.laboratory import Laboratory
from ...skeleton.masks import number_documents, several
from .configuration_performer import ArchPerformerConfig


class FavorAttention(Attention):
    """The projections of softmax attention, and linear attention of random features of queries and keys (FAVOR+)."""

    def __init__(self, config: ArchPerformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.features = FEATURES[config.kernel_type](config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        self.features.count_step()
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (proj(hidden_states).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = position_embeddings.rotate(query, key)
        memory = self.memory(past_key_values, layer_idx)
        return self.o_proj(self.attend_by_features((query, key, value), attention_mask, memory).flatten(-2))

    def attend_by_features(
        self, tensors: tuple[torch.Tensor, ...], documents: torch.Tensor | None, memory: RecurrentCacheLayer | None
    ) -> torch.Tensor:
        """Queries, keys and values [batch, length, heads, dim] -> [batch, length, heads, dim]."""
        return in_pieces(self.mix, tensors, documents, memory)

    def mix(self, query, key, value, documents, memory):
        query = self.features.of_queries(query, self.scaling)
        key, log_scale = self.features.of_keys(key, self.scaling)
        if self.num_key_value_groups > 1:
            key, value, log_scale = (x.repeat_interleave(self.num_key_value_groups, 2) for x in (key, value, log_scale))
        forms, tensors = (recurrent_linear_attention, chunk_linear_attention), (query, key, value, log_scale)
        output, state = carry_on(forms, memory, "state", tensors, documents=documents)
        if memory is not None:
            memory.write(query.shape[1], **state)
        return output


class BidirectionalFavorAttention(FavorAttention):
    """The same over all tokens of a document: one state, which every query asks."""

    is_causal = False

    def attend_by_features(self, tensors, documents, memory):
        if not several(documents):
            return self.of_all(*tensors, None if documents is None else documents > 0)
        found = find_documents(documents)
        output = self.of_all(*(found.unpack(tensor) for tensor in tensors), found.real)
        return found.repack(output, *documents.shape)

    def of_all(self, query, key, value, real):
        """A few tokens after another, so that their features stay in a CPU's cache; in a program, which would hold
        their number for one batch, all at once."""
        at_once = query.device.type != "cpu" or torch.compiler.is_exporting()
        size = query.shape[1] if at_once else max(PIECE // len(query), PIECE // 8)
        parts = [slice(start, start + size) for start in range(0, query.shape[1], size)]
        state = None
        for part in parts:
            features, log_scale = self.features.of_keys(key[:, part], self.scaling)
            told = {"real": None if real is None else real[:, part], "state": state}
            state = gather_keys(features, value[:, part], log_scale, **told)
        state = state.repeat_interleave(self.num_key_value_groups, 1)
        outputs = [ask_keys(self.features.of_queries(query[:, part], self.scaling), state) for part in parts]
        return torch.cat(outputs, dim=1).to(value.dtype)


class ArchPerformerModel(Laboratory):
    config: ArchPerformerConfig
    mixers = {"favor": FavorAttention, "bidirectional_favor": BidirectionalFavorAttention}
    masks = {"bidirectional_favor": number_documents}


class ArchPerformerForCausalLM(CausalLM):
    config: ArchPerformerConfig
    backbone = ArchPerformerModel


class ArchPerformerForMaskedLM(MaskedLM):
    config: ArchPerformerConfig
    backbone = ArchPerformerModel


class ArchPerformerForSequenceClassification(SequenceClassification):
    config: ArchPerformerConfig
    backbone = ArchPerformerModel


class ArchPerformerForTokenClassification(TokenClassification):
    config: ArchPerformerConfig
    backbone = ArchPerformerModel


class ArchPerformerForQuestionAnswering(QuestionAnswering):
    config: ArchPerformerConfig
    backbone = ArchPerformerModel
