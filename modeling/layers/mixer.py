from collections.abc import Callable
from itertools import repeat

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..ops.documents import document_pieces
from .cache import RecurrentCacheLayer

PIECE = 512  # tokens of all rows that a recurrent mixer takes at once on a CPU


class Mixer(nn.Module):
    """The part of a layer that moves information between positions. Attention, recurrence and SSM are all mixers.

    A mixer is built from (config, layer_idx) and answers

        mixer(hidden_states, attention_mask, position_embeddings, past_key_values, layer_idx) -> hidden_states

    The layer type decides what the mask and the cache hold. Attention gets a 4D mask (or None) and stores keys and
    values by `past_key_values.update`; a recurrence gets the number of each token's document, 0 for padding (None when
    all are of one document), and keeps its states in `self.memory(past_key_values, layer_idx)`. The index of the cache
    layer comes with the call, since layers may share a mixer. A mixer touches no other layer's cache. Whatever a call
    may record (attention weights) passes through a module of `record.py`. `state_parameters` names what sets the memory
    of a state space, here or inside: it trains slowly, without weight decay (`hf_arch.parameter_groups`). `unquantized`
    names parts, of a mixer as of any module, whose matrices decide rather than answer: `hf_arch.compress.quantize`
    leaves them as they are.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    @staticmethod
    def memory(past_key_values: Cache | None, layer_idx: int) -> RecurrentCacheLayer | None:
        """The cache layer of this call."""
        return None if past_key_values is None else past_key_values.layers[layer_idx]

    def init_parameters(self, std: float) -> None:
        """Fill the parameters that are not inside a Linear, Embedding or norm."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        raise NotImplementedError


class PiecewiseMixer(Mixer):
    """A recurrence whose answer does not depend on where a text is cut: `mix` is what it does with a piece of one."""

    def mix(
        self, hidden_states: torch.Tensor, documents: torch.Tensor | None, memory: RecurrentCacheLayer | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        return in_pieces(self.mix, (hidden_states,), attention_mask, self.memory(past_key_values, layer_idx))


def carry_on(
    forms: tuple[Callable, Callable], memory: RecurrentCacheLayer | None, name: str, tensors: tuple, **options
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Call an op of `ops/` where the memory says that it stopped: its definition (the first form) for a single step,
    else its parallel form. The output, and what the memory should write, {} where there is none."""
    state = None if memory is None else memory.read(name)
    form = forms[0] if state is not None and tensors[0].shape[1] == 1 else forms[1]
    output, state = form(*tensors, initial_state=state, output_final_state=memory is not None, **options)
    return output, {} if memory is None else {name: state}


def in_pieces(
    mix: Callable,
    tensors: tuple[torch.Tensor, ...],
    documents: torch.Tensor | None,
    memory: RecurrentCacheLayer | None,
) -> torch.Tensor:
    """mix(*tensors [batch, length, ...], documents, memory) a few tokens after another, from state to state: on a CPU,
    what is made of them stays in the cache, which is several times as fast as the memory. The answer is the same."""
    batch, length = tensors[0].shape[:2]
    size = max(PIECE // batch, PIECE // 8)
    if length <= size or tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return mix(*tensors, documents, memory)
    passing = RecurrentCacheLayer()
    if memory is not None and memory.is_initialized:
        passing.write(0, **memory.states)
    numbers = repeat(None) if documents is None else document_pieces(documents, size)
    pieces = zip(*(tensor.split(size, dim=1) for tensor in tensors), numbers, strict=False)
    outputs = [mix(*piece, passing) for piece in pieces]
    if memory is not None:
        memory.write(length, **passing.states)
    return torch.cat(outputs, dim=1)
