"""RetNet (Sun et al., 2023, arXiv:2307.08621): a decoder whose attention is retention, a fading linear memory."""

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...layers.mixer import Mixer, carry_on
from ...layers.positions import RotaryEmbedding
from ...ops.retention import chunk_retention, recurrent_retention
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from .configuration_retnet import ArchRetNetConfig


class RetNetRotaryEmbedding(RotaryEmbedding):
    """Rotations from one radian per token to one per `rope_theta` tokens, both included, as in the official code."""

    @staticmethod
    def compute_default_rope_parameters(config: ArchRetNetConfig, **kwargs) -> tuple[torch.Tensor, float]:
        pairs = config.hidden_size // config.num_attention_heads // 2
        return 1.0 / (config.rope_parameters["rope_theta"] ** torch.linspace(0, 1, pairs)), 1.0


class MultiScaleRetention(Mixer):
    """Rotary queries and keys, retention, a norm per head and a swish gate (equation 8)."""

    def __init__(self, config: ArchRetNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        value_size = round(config.hidden_size * config.value_expansion)
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, value_size, bias=config.attention_bias)
        self.g_proj = nn.Linear(config.hidden_size, value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(value_size, config.hidden_size, bias=config.attention_bias)
        self.head_norm = nn.RMSNorm(value_size // config.num_attention_heads, config.norm_eps, elementwise_affine=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = position_embeddings.rotate(query, key)

        memory = self.memory(past_key_values, layer_idx)
        forms = recurrent_retention, chunk_retention
        output, state = carry_on(forms, memory, "state", (query, key, value), documents=attention_mask)
        if memory is not None:
            memory.write(query.shape[1], **state)

        gate = nn.functional.silu(self.g_proj(hidden_states))
        return self.o_proj(gate * self.head_norm(output).flatten(-2))


class ArchRetNetModel(Backbone):
    config: ArchRetNetConfig
    positions = RetNetRotaryEmbedding
    mixers = {"retention": MultiScaleRetention}


class ArchRetNetForCausalLM(CausalLM):
    config: ArchRetNetConfig
    backbone = ArchRetNetModel


class ArchRetNetForSequenceClassification(SequenceClassification):
    config: ArchRetNetConfig
    backbone = ArchRetNetModel


class ArchRetNetForTokenClassification(TokenClassification):
    config: ArchRetNetConfig
    backbone = ArchRetNetModel


class ArchRetNetForQuestionAnswering(QuestionAnswering):
    config: ArchRetNetConfig
    backbone = ArchRetNetModel
