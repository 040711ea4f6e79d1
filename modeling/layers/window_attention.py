"""Causal attention to the last tokens and to the first, whose memory is as large as what it sees."""

import torch
import torch.nn.functional as F

from ..ops.band import make_band, take, visible_in_band
from ..ops.banded_attention import attend_seen, banded_attention, dense_weights
from ..ops.documents import document_numbers, first_of_documents
from .attention import Attention
from .cache import RecurrentCacheLayer
from .record import weights_asked


class CausalWindowAttention(Attention):
    """Attention to the last tokens of a document, itself included, every so manieth of them, and to its first ones.

    A memory holds those that are yet to be seen: the last `(window - 1) * dilation` real tokens, and the first.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        window, self.dilation, self.first = config.causal_window(layer_idx)
        self.before, self.sliding_window = window - 1, window

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
        to_first = position_embeddings.rotate_to_first(query) if self.first else None
        query, key = position_embeddings.rotate(query, key)
        memory = self.memory(past_key_values, layer_idx)
        documents = document_numbers(attention_mask, query)
        if memory is None or memory.read("window_count") is None:
            landmarks = first_of_documents(documents, self.first) if self.first else None
            told = (attention_mask, landmarks, self.first if attention_mask is None else None)
            output, weights = self.see(query, to_first, key, value, *told, output_attentions)
            if memory is not None:
                last = documents * (documents == documents.amax(1, keepdim=True))
                self.remember(memory, query.shape[1], last > 0, key, value)
            return self.answer(output, weights)
        seen = self.recall(memory, documents > 0, key, value)
        output = self.go_on(query, to_first, *seen)
        self.remember(memory, query.shape[1], *seen)
        return self.answer(output, None)

    def see(self, query, to_first, key, value, documents, landmarks, count, output_attentions=None):
        """What the queries see among the keys beside them: ([batch, length, heads, dim], weights or None). `to_first`
        are the queries that ask the first tokens, None where they are the same."""
        band = make_band(query[..., 0, 0], self.before, 0, self.dilation, documents, landmarks, count)
        told = self.block_options() | {"landmark_query": to_first}
        output, weights = banded_attention(query, key, value, band, **told)
        asked = weights is not None and weights_asked(self.config, output_attentions)
        return output, dense_weights(weights, band) if asked else None

    def go_on(self, query, to_first, real: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The same where the queries are the last of the keys; `real` [batch, keys]."""
        documents, missing = real.long(), key.shape[1] - query.shape[1]
        landmarks = first_of_documents(documents, self.first)
        if query.shape[1] > missing:
            padded = (None if x is None else F.pad(x, (0, 0, 0, 0, missing, 0)) for x in (query, to_first))
            return self.see(*padded, key, value, documents, landmarks, self.first)[0][:, missing:]
        seen = visible_in_band(documents, self.before, 0, self.dilation, landmarks, query.shape[1])
        told = self.block_options() | {"landmark_query": to_first}
        return attend_seen(query, key, value, seen, landmarks, **told)

    def recall(self, memory: RecurrentCacheLayer, real: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """(which are there [batch, keys], keys, values) of the first tokens, the last, and the new ones."""
        count = memory.read("window_count")[:, None]
        first = torch.arange(self.first, device=key.device)
        place = count - self.before * self.dilation + torch.arange(self.before * self.dilation, device=key.device)
        there = torch.cat((first < count, place >= self.first, real), dim=1)
        held = (
            torch.cat([memory.read(f"window_{part}{name}").to(new.dtype) for part in ("first_", "")] + [new], dim=1)
            for name, new in (("keys", key), ("values", value))
        )
        return there, *held

    def remember(
        self, memory: RecurrentCacheLayer, new_tokens: int, real: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write what later tokens see of these, the real ones among which are those of the document so far."""
        reach = self.before * self.dilation
        order = (~real).long().sort(dim=1, stable=True).indices
        count = real.sum(1, keepdim=True)
        columns = torch.arange(self.first + reach, device=key.device).expand(real.shape[0], -1)
        columns = torch.where(columns < self.first, columns, columns - self.first - reach + count)
        there = (columns >= 0) & (columns < count)
        columns = order.gather(1, columns.clamp(0, real.shape[1] - 1))
        states = {}
        for name, x in (("keys", key), ("values", value)):
            held = take(x, columns) * there[..., None, None]
            states[f"window_first_{name}"], states[f"window_{name}"] = held.split((self.first, reach), dim=1)
        read = memory.read("window_count")
        seen = real[:, -new_tokens:].sum(1)
        memory.write(new_tokens, window_count=seen if read is None else read + seen, **states)
