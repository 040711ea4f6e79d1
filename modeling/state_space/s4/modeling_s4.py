"""S4 and S4D (Gu et al., 2021, arXiv:2111.00396; 2022, arXiv:2206.11893): linear state spaces that are the same at
every step, and the layer around them."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from ...layers.mixer import Mixer
from ...layers.state_space import DiagonalStateSpace, LowRankStateSpace
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, MaskedLM
from .configuration_s4 import ArchS4Config


class S4D(Mixer):
    """GLU(out_proj(gelu(y))), y the answer of a state space for each channel."""

    state_space_class: type[nn.Module] = DiagonalStateSpace

    def __init__(self, config: ArchS4Config, layer_idx: int):
        super().__init__(config, layer_idx)
        directions = 2 if config.direction == "bidirectional" else 1
        self.state_space = self.state_space_class(config, config.hidden_size, directions)
        self.out_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)

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
        output, state = self.state_space(hidden_states, attention_mask, memory)
        if memory is not None:
            memory.write(hidden_states.shape[1], **state)
        return F.glu(self.out_proj(F.gelu(output)))


class S4(S4D):
    state_space_class = LowRankStateSpace


class ArchS4Model(Backbone):
    config: ArchS4Config
    mixers = {"s4d": S4D, "s4": S4}
    norm_class = nn.LayerNorm


class ArchS4ForCausalLM(CausalLM):
    config: ArchS4Config
    backbone = ArchS4Model


class ArchS4ForMaskedLM(MaskedLM):
    config: ArchS4Config
    backbone = ArchS4Model


class ArchS4ForSequenceClassification(SequenceClassification):
    config: ArchS4Config
    backbone = ArchS4Model


class ArchS4ForTokenClassification(TokenClassification):
    config: ArchS4Config
    backbone = ArchS4Model


class ArchS4ForQuestionAnswering(QuestionAnswering):
    config: ArchS4Config
    backbone = ArchS4Model
