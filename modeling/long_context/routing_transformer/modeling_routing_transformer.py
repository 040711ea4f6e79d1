"""Routing Transformer (Roy et al., 2020, arXiv:2003.05997): heads that see what is near, and heads that see the tokens
of a cluster, wherever in the text they are."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from ...layers.bucketed import attend_in_buckets
from ...layers.centroids import Centroids
from ...layers.mixer import Mixer
from ...layers.positions import RotaryEmbedding
from ...ops.band import neighbouring_blocks
from ...ops.banded_attention import banded_attention
from ...ops.clustered_attention import clustered_attention
from ...ops.documents import find_documents
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, MaskedLM
from ...skeleton.masks import number_documents
from .configuration_routing_transformer import ArchRoutingTransformerConfig


def layer_normed(query: torch.Tensor, key: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What asks and what is asked in the scores, and what of each finds its cluster: without a mean, of length
    sqrt(dim) (section 4.1 of the paper). Without a key, queries are keys too."""
    query = F.layer_norm(query, query.shape[-1:])
    key = query if key is None else F.layer_norm(key, key.shape[-1:])
    return query, key, query, key


def unit_length(query: torch.Tensor, key: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The same as lucidrains' routing-transformer does."""
    direction = F.normalize(query, dim=-1)
    return (
        (query, direction, direction, direction) if key is None else (query, key, direction, F.normalize(key, dim=-1))
    )


NORMS_OF_ROUTED = {"layer_norm": layer_normed, "unit": unit_length}


class Routing(Mixer):
    """Causal attention of local heads to their block and the one before, of routed heads to the last tokens of a
    cluster, which share queries and keys and see themselves only where they see no other."""

    def __init__(self, config: ArchRoutingTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim, self.num_local_heads = config.head_dim, config.local_heads(layer_idx)
        self.cluster_size, self.local_window = config.cluster_size, config.local_window
        self.norm_of_routed = NORMS_OF_ROUTED[config.routed_norm]
        self.rotary_routed, self.attention_dropout = config.rotary_routed, config.attention_dropout
        heads = config.num_attention_heads
        routed = heads - self.num_local_heads
        for name, count in (("q_proj", heads), ("k_proj", self.heads_with_keys(heads)), ("v_proj", heads)):
            width = count * self.head_dim
            setattr(self, name, nn.Linear(config.hidden_size, width, bias=config.attention_bias) if width else None)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        decay = config.centroid_decay
        self.centroids = Centroids(routed, config.num_clusters, self.head_dim, decay) if routed else None

    def heads_with_keys(self, heads: int) -> int:
        """How many heads have keys that are not their queries."""
        return self.num_local_heads

    @property
    def dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        memory = self.memory(past_key_values, layer_idx)
        projections, near = (self.q_proj, self.k_proj, self.v_proj), self.num_local_heads
        query, key, value = (self.split(proj, hidden_states) for proj in projections)
        outputs, states = [], {}
        if near:
            told = *position_embeddings.rotate(query[:, :, :near], key[:, :, :near]), value[:, :, :near]
            output, state = self.see_near(*told, attention_mask, memory)
            outputs.append(output)
            states |= state
        if self.centroids is not None:
            query, value = query[:, :, near:], value[:, :, near:]
            key = None if key is None or key.shape[2] == near else key[:, :, near:]
            if self.rotary_routed:
                query, value = position_embeddings.rotate(query, value)
                key = None if key is None else position_embeddings.rotate(key, key)[0]
            told = *self.norm_of_routed(query, key), value
            output, state = self.see_far(*told, attention_mask, memory)
            outputs.append(output)
            states |= state
        if memory is not None:
            memory.write(hidden_states.shape[1], **states)
        return self.o_proj(torch.cat(outputs, dim=2).flatten(-2))

    def split(self, projection: nn.Linear | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return None if projection is None else projection(hidden_states).unflatten(-1, (-1, self.head_dim))

    def see_near(self, query, key, value, documents, memory) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What local heads answer, and what the memory should write: all tokens are of one bucket."""
        one = torch.zeros(*query.shape[:2], 1, 1, dtype=torch.long, device=query.device)
        told = {"num_buckets": 1, "block": self.local_window // 2, "documents": documents, "dropout": self.dropout}
        query = query * self.head_dim**-0.5
        return attend_in_buckets(memory, query, key, value, one, name="near_history", **told)

    def see_far(self, query, key, towards, towards_of_keys, value, documents, memory):
        """The same of routed heads. Queries are keys, too."""
        nearest = self.centroids.nearest(self.centroids.affinity(towards))
        self.centroids.follow(towards, nearest, documents)
        told = {"num_buckets": self.centroids.value.shape[1], "block": self.cluster_size // 2, "documents": documents}
        told |= {"sees_itself": False, "dropout": self.dropout, "name": "far_history"}
        query, buckets = query * self.head_dim**-0.5, nearest.transpose(1, 2)[..., None]
        return attend_in_buckets(memory, query, key, value, buckets, **told)


class BidirectionalRouting(Routing):
    """The same of an encoder: local heads see the block after theirs, too, and each cluster takes the tokens nearest to
    it of all, as queries and as keys."""

    def heads_with_keys(self, heads):
        return heads

    def see_near(self, query, key, value, documents, memory):
        found = None if documents is None else find_documents(documents)
        rows = (query, key, value) if found is None else [found.unpack(x) for x in (query, key, value)]
        band = neighbouring_blocks(rows[0], None if found is None else found.real, self.local_window // 2)
        output, _ = banded_attention(*rows, band, dropout=self.dropout)
        return output if found is None else found.repack(output, *documents.shape), {}

    def see_far(self, query, key, towards, towards_of_keys, value, documents, memory):
        near = [self.centroids.affinity(x) for x in (towards, towards_of_keys)]
        for tokens, affinity in zip((towards, towards_of_keys), near, strict=True):
            self.centroids.follow(tokens, self.centroids.nearest(affinity), documents)
        told = {"documents": documents, "dropout": self.dropout}
        return clustered_attention(query, key, value, *near, self.cluster_size, **told), {}


class ArchRoutingTransformerModel(Backbone):
    config: ArchRoutingTransformerConfig
    mixers = {"routing": Routing, "bidirectional_routing": BidirectionalRouting}
    masks = {"bidirectional_routing": number_documents}
    positions = RotaryEmbedding
    norm_class = nn.LayerNorm


class ArchRoutingTransformerForCausalLM(CausalLM):
    config: ArchRoutingTransformerConfig
    backbone = ArchRoutingTransformerModel

    def add_head(self, config):
        super().add_head(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)


class ArchRoutingTransformerForMaskedLM(MaskedLM):
    config: ArchRoutingTransformerConfig
    backbone = ArchRoutingTransformerModel


class ArchRoutingTransformerForSequenceClassification(SequenceClassification):
    config: ArchRoutingTransformerConfig
    backbone = ArchRoutingTransformerModel


class ArchRoutingTransformerForTokenClassification(TokenClassification):
    config: ArchRoutingTransformerConfig
    backbone = ArchRoutingTransformerModel


class ArchRoutingTransformerForQuestionAnswering(QuestionAnswering):
    config: ArchRoutingTransformerConfig
    backbone = ArchRoutingTransformerModel
