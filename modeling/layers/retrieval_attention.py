"""Causal attention to the last tokens, to the first, and to the earlier blocks that fit a query best."""

import torch
import torch.nn.functional as F

from ..ops.chosen_blocks import Choice, best_blocks
from ..ops.documents import Unpacked, find_documents
from ..ops.retrieved_attention import (
    Retrieval,
    Text,
    bounds_of,
    dense_weights_by_retrieval,
    retrieved_attention,
    step_of_retrieval,
    text_of,
)
from .attention import Attention
from .cache import HistoryCacheLayer
from .record import weights_asked

LEAST_ROOM = 256  # tokens that a memory takes in before it is made larger


class RetrievalAttention(Attention):
    """Attention to a window, to the first tokens, and to blocks that each query chooses among all before the window.

    A memory holds the keys and values of all real tokens, by place, and bounds on what the keys of a block can score: a
    step reads these, and as many keys however long the text.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.rule = Retrieval(
            config.sliding_window, config.num_sink_tokens, config.retrieval_block_size, config.retrieved_blocks
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values=None,
        layer_idx: int = 0,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> torch.Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        query, key = position_embeddings.rotate(query, key)
        memory = self.memory(past_key_values, layer_idx)
        if memory is not None and memory.read("text_history_count") is not None:
            return self.answer(self.go_on(memory, query, key, value, attention_mask), None)
        found, rows = None, (query, key, value)
        if attention_mask is not None:
            found = find_documents(attention_mask)
            rows = tuple(found.unpack(x) for x in rows)
        query, key, value = (x.transpose(1, 2) for x in rows)
        place = torch.arange(query.shape[2], device=query.device)[None]
        if memory is not None:
            self.begin(memory, *hidden_states.shape[:2], key, value, found)
        weights = None
        if weights_asked(self.config, output_attentions):
            told = {"scale": self.scaling, "choose": self.choose}
            weights = dense_weights_by_retrieval(query, key, place, self.rule, **told)
            output = weights @ value.repeat_interleave(self.num_key_value_groups, dim=1)
            weights = weights if found is None else of_columns(weights, found, *hidden_states.shape[:2])
        else:
            output = retrieved_attention(query, text_of(key, value, self.rule.block), place, **self.told())
        output = output.transpose(1, 2)
        return self.answer(output if found is None else found.repack(output, *hidden_states.shape[:2]), weights)

    def choose(self, bound: torch.Tensor, count: int) -> Choice:
        return best_blocks(bound, count)

    def told(self) -> dict:
        dropout = self.attention_dropout if self.training else 0.0
        return {"rule": self.rule, "scale": self.scaling, "dropout": dropout, "choose": self.choose}

    def begin(self, memory: HistoryCacheLayer, batch: int, length: int, key, value, found: Unpacked | None) -> None:
        """Write the last documents of a batch, of which `key` and `value` [rows, heads, longest, dim] hold all."""
        count = torch.full((batch,), key.shape[2], device=key.device)
        if found is not None:
            row, count = found.batch_row[found.last], torch.zeros_like(count)
            count[row] = found.lengths[found.last]
            key, value = (x.new_zeros(batch, *x.shape[1:]).index_copy(0, row, x[found.last]) for x in (key, value))
        room = self.in_blocks(memory.room(length))
        text = text_of(*(F.pad(x, (0, 0, 0, room - x.shape[2])) for x in (key, value)), self.rule.block)
        write(memory, length, text, count)

    def in_blocks(self, tokens: int) -> int:
        return -(-tokens // self.rule.block) * self.rule.block

    def go_on(self, memory: HistoryCacheLayer, query, key, value, documents: torch.Tensor | None) -> torch.Tensor:
        """The answer for tokens [batch, length, heads, dim] that follow what is remembered, and remember them, too."""
        count, text = memory.read("text_history_count"), Text(*(memory.read(f"text_history_{x}") for x in Text._fields))
        real = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
        real = real if documents is None else documents > 0
        place = count[:, None] + real.long().cumsum(1) - 1
        room = memory.room(query.shape[1])
        if text.key.shape[2] < room:
            room = self.in_blocks(room + max(LEAST_ROOM, room // 2))
            more = (0, 0, 0, room - text.key.shape[2]), (0, 0, 0, (room - text.key.shape[2]) // self.rule.block)
            text = Text(*(F.pad(x, more[name == "bounds"]) for name, x in text._asdict().items()))
        elif not memory.writable(text.key, appended=True):
            text = Text(*(x.clone() for x in text))
        place, count = place.clamp(min=0), count + real.sum(1)
        self.append(text, key, value, place, torch.where(real, place, count[:, None]))
        write(memory, query.shape[1], text, count)
        form = step_of_retrieval if query.shape[1] == 1 else retrieved_attention
        return form(query.transpose(1, 2), text, place, **self.told()).transpose(1, 2)

    def append(self, text: Text, key, value, place: torch.Tensor, column: torch.Tensor) -> None:
        """Put tokens into their columns, those of padding into one that is free, and bound the blocks that they are
        of."""
        row = torch.arange(place.shape[0], device=place.device)[:, None]
        for held, new in ((text.key, key), (text.value, value)):
            held[row, :, column] = new.to(held.dtype)
        block, last = self.rule.block, text.bounds.shape[2] - 1
        touched = torch.arange((key.shape[1] + block - 2) // block + 1, device=place.device)
        number = (place[:, :1] // block + touched).clamp(max=last)
        text.bounds[row, :, number] = bounds_of(text.key.unflatten(2, (-1, block))[row, :, number])


def write(memory: HistoryCacheLayer, new_tokens: int, text: Text, count: torch.Tensor) -> None:
    states = {f"text_history_{name}": x for name, x in text._asdict().items()}
    memory.write(new_tokens, text_history_count=count, **states)


def of_columns(weights: torch.Tensor, found: Unpacked, batch: int, length: int) -> torch.Tensor:
    """Weights of documents [documents, heads, longest, longest] as a batch [batch, heads, length, length]."""
    column = torch.full((len(weights), found.longest), length, device=weights.device)
    column[found.row, found.place] = found.token % length
    dense = weights.new_zeros(batch, length + 1, length + 1, weights.shape[1])
    index = found.batch_row[:, None, None], column[:, :, None], column[:, None]
    dense = dense.index_put(index, weights.movedim(1, -1))[:, :length, :length].movedim(-1, 1)
    return dense + torch.diag_embed(1 - dense.sum(-1).round())  # padding sees itself
