"""H3 (Fu et al., 2022, arXiv:2212.14052): two state spaces and two gates that compare tokens as attention does."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ...layers.attention import Attention
from ...layers.mixer import Mixer, carry_on
from ...layers.short_convolution import ShortConvolution
from ...layers.state_space import DiagonalStateSpace
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from .configuration_h3 import ArchH3Config


class ShiftStateSpace(ShortConvolution):
    """A state that holds the last tokens, and what reads it: a convolution over them, with a skip in its last tap
    (section 3.1). Few of its numbers are about memory: it trains as any convolution."""

    def init_parameters(self, std: float) -> None:
        """As torch begins a Conv1d, and a skip by chance."""
        channels, size = self.weight.shape
        weight = (torch.rand(channels, size) * 2 - 1) / math.sqrt(size)
        init.copy_(self.weight, torch.cat((weight[:, :-1], weight[:, -1:] + torch.randn(channels, 1)), dim=1))


def copies_as_rows(form: Callable) -> Callable:
    """A form of a state space for x [batch, length, copies, channels], each copy of a text as a row of its own."""

    def call(x, *matrices, documents=None, initial_state=None, **options):
        (batch, _, copies, _), rows = x.shape, x.transpose(1, 2).flatten(0, 1)
        documents = None if documents is None else documents.repeat_interleave(copies, dim=0)
        state = None if initial_state is None else initial_state.flatten(0, 1)
        y, state = form(rows, *matrices, documents=documents, initial_state=state, **options)
        state = None if state is None else state.unflatten(0, (batch, copies))
        return y.unflatten(0, (batch, copies)).transpose(1, 2), state

    return call


class CopiedStateSpace(DiagonalStateSpace):
    """One state space for all pairs of a head."""

    def forward(self, x, documents, memory):
        """x [batch, length, copies, channels]"""
        tensors = (x, *self.derive("matrices", self.matrices))
        forms = copies_as_rows(self.step), copies_as_rows(self.in_chunks)
        return carry_on(forms, memory, self.name, tensors, documents=documents)


class H3(Mixer):
    """q * diagonal(shift(k) * v), in heads: each key of a head with each of its values, summed over the keys by q
    (algorithm 1)."""

    def __init__(self, config: ArchH3Config, layer_idx: int):
        super().__init__(config, layer_idx)
        size = config.hidden_size
        self.head_dim = config.state_head_dim
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(size, size, bias=config.attention_bias))
        self.shift = ShiftStateSpace(size, config.state_size, bias=False)
        self.state_space = CopiedStateSpace(config, size // self.head_dim)

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
        query, key, value = (projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj))
        key, shifted = self.shift(key, attention_mask, memory)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(-1, -2) for x in (query, key, value))
        pairs = key[:, :, :, None] * value[:, :, None]  # [batch, length, key, value, heads]
        output, state = self.state_space(pairs.flatten(2, 3), attention_mask, memory)
        if memory is not None:
            memory.write(hidden_states.shape[1], **shifted, **state)
        output = (output.contiguous().view_as(pairs) * query[:, :, :, None]).sum(2)
        return self.o_proj(output.flatten(-2))


class ArchH3Model(Backbone):
    config: ArchH3Config
    mixers = {"h3": H3, "full_attention": Attention}
    norm_class = nn.LayerNorm


class ArchH3ForCausalLM(CausalLM):
    config: ArchH3Config
    backbone = ArchH3Model


class ArchH3ForSequenceClassification(SequenceClassification):
    config: ArchH3Config
    backbone = ArchH3Model


class ArchH3ForTokenClassification(TokenClassification):
    config: ArchH3Config
    backbone = ArchH3Model


class ArchH3ForQuestionAnswering(QuestionAnswering):
    config: ArchH3Config
    backbone = ArchH3Model
