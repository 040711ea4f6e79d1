"""Hyena (Poli et al., 2023, arXiv:2302.10866): long convolutions and gates in turn, in the place of attention."""

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...layers.implicit_filter import ImplicitFilter
from ...layers.mixer import Mixer, carry_on
from ...layers.modal_filter import ModalFilter
from ...layers.short_convolution import ShortConvolution
from ...ops.diagonal_state_space import chunk_diagonal_state_space, recurrent_diagonal_state_space
from ...ops.documents import find_documents
from ...ops.long_convolution import long_convolution, recurrent_long_convolution
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from .configuration_hyena import ArchHyenaConfig


class Hyena(Mixer):
    """Projections, a short convolution, then gates and long convolutions in turn (definition 3.1).

    With x_0 ... x_(N-1) and v the convolved projections and N the order: v = filter * (x_n v) for n = N-1 ... 1, each
    filter with a bias for the token itself; y = x_0 v.
    """

    def __init__(self, config: ArchHyenaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        size, self.order = config.hidden_size, config.hyena_order
        self.in_proj = nn.Linear(size, (self.order + 1) * size, bias=config.attention_bias)
        self.convolution = ShortConvolution((self.order + 1) * size, config.short_filter_order)
        self.filter = self.make_filter(config)
        self.out_proj = nn.Linear(size, size, bias=config.attention_bias)

    def make_filter(self, config: ArchHyenaConfig) -> nn.Module:
        sizes = config.filter_emb_dim, config.filter_order
        told = config.max_position_embeddings, sizes, config.filter_frequency, config.filter_shift
        return ImplicitFilter(config.hidden_size, config.hyena_order - 1, *told)

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
        mixed, states = self.convolution(self.in_proj(hidden_states), attention_mask, memory)
        *gates, value = mixed.chunk(self.order + 1, dim=-1)
        filters = self.filters(hidden_states.shape[1], attention_mask, memory)
        for n, gate in enumerate(reversed(gates[1:])):
            value, state = self.convolve(value * gate, filters[n], attention_mask, memory, n)
            states |= state
        if memory is not None:
            memory.write(hidden_states.shape[1], **states)
        return self.out_proj(value * gates[0])

    def filters(self, new_tokens: int, documents: torch.Tensor | None, memory) -> list:
        """As long as the text is. Raises ValueError where that is past the time that they know."""
        tokens, longest = new_tokens if memory is None else memory.room(new_tokens), self.filter.longest
        if tokens > longest and tokens == new_tokens and documents is not None:
            tokens = find_documents(documents).longest
        if tokens > longest:
            raise ValueError(
                f"The text has {tokens} tokens, and filters know no time past {longest} (max_position_embeddings): "
                "shorten it, or train a model with longer filters."
            )
        if memory is None:
            return self.filter(tokens)
        return self.filter(min(tokens + 1, longest), going_on=memory.is_initialized)  # a history is kept for the next

    def convolve(self, x, filter, documents, memory, n: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        forms, told = (recurrent_long_convolution, long_convolution), {"transform": filter.transform}
        return carry_on(forms, memory, f"history_{n}", (x, filter.kernel), documents=documents, **told)


class ModalHyena(Hyena):
    """The same with filters that are small recurrences: a state of fixed size, texts of any length."""

    def make_filter(self, config: ArchHyenaConfig) -> nn.Module:
        sizes = config.hidden_size, config.hyena_order - 1, config.state_size
        return ModalFilter(*sizes, config.max_position_embeddings)

    def filters(self, new_tokens: int, documents: torch.Tensor | None, memory) -> list:
        return self.filter()

    def convolve(self, x, filter, documents, memory, n: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        forms = recurrent_diagonal_state_space, chunk_diagonal_state_space
        return carry_on(forms, memory, f"state_{n}", (x, *filter), documents=documents)


class ArchHyenaModel(Backbone):
    config: ArchHyenaConfig
    mixers = {"hyena": Hyena, "modal_hyena": ModalHyena}
    norm_class = nn.LayerNorm


class ArchHyenaForCausalLM(CausalLM):
    config: ArchHyenaConfig
    backbone = ArchHyenaModel


class ArchHyenaForSequenceClassification(SequenceClassification):
    config: ArchHyenaConfig
    backbone = ArchHyenaModel


class ArchHyenaForTokenClassification(TokenClassification):
    config: ArchHyenaConfig
    backbone = ArchHyenaModel


class ArchHyenaForQuestionAnswering(QuestionAnswering):
    config: ArchHyenaConfig
    backbone = ArchHyenaModel
