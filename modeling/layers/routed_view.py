"""A layer for some of the tokens of a text: mixture of depths (Raposo et al., 2024, arXiv:2404.02258)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_tracing

from ..ops.token_choice import ChosenRows, rows_of, rows_of_share, share_of_length, top_share
from .chosen_cache import ChosenCacheLayer, FirstKeys, RememberedKeys
from .side_loss import SideLoss
from .view import View


class Predictor(nn.Module):
    """w2 act(w1 x / |x|) + b, |x| the root of the mean of squares: the logit of whether a token is among those that the
    router chooses of the whole text. However small the stream begins, it learns as fast as what it has to follow."""

    def __init__(self, config):
        super().__init__()
        size = config.predictor_size or max(1, config.hidden_size // 4)
        self.in_proj, self.out_proj = nn.Linear(config.hidden_size, size, bias=False), nn.Linear(size, 1)
        self.act_fn, self.eps = ACT2FN[config.hidden_act], config.norm_eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., 1]"""
        length = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=wide(hidden_states))
        scale = torch.rsqrt(length.square() / hidden_states.shape[-1] + self.eps)
        return self.out_proj(self.act_fn(self.in_proj(hidden_states) * scale.to(hidden_states.dtype)))


def wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class RoutedView(View):
    """x + w (f(x) - x) for chosen tokens, x for the others (equation 1): f is the rest of the layer, in which chosen
    tokens see the chosen ones before them, at their places in the text, and w = gate(x), not squashed.

    In training the share `config.capacity` of each document with the largest w is chosen. That looks at the whole text,
    so otherwise a token is chosen where `predictor`, which sees no other, takes it for more likely than not that it
    would be. The predictor learns by a `SideLoss`; nothing else learns from it.
    """

    unquantized = ("gate", "predictor")

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.capacity = config, config.capacity
        self.gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.predictor = Predictor(config)

    def forward(
        self,
        stream: torch.Tensor,
        inside: Callable[..., torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        layer_idx: int = 0,
        side_loss: SideLoss | None = None,
        **context,
    ) -> torch.Tensor:
        """`attention_mask`: the number of each token's document, 0 for padding, None where all are of one."""
        documents, context = attention_mask, context | {"layer_idx": layer_idx}
        memory = None if past_key_values is None else past_key_values.layers[layer_idx]
        weight = self.gate(stream)
        if self.training:
            chosen = top_share(weight.squeeze(-1), self.capacity, documents)
            zero = self.learn(stream, chosen, documents, side_loss, layer_idx)
        else:
            scores = self.predictor(stream)
            chosen, zero = self.decide(scores).squeeze(-1), scores[:0].sum()
            chosen = chosen if documents is None else chosen & (documents > 0)
        weight = (weight + zero).to(stream.dtype)
        if self.training and documents is None and memory is None:
            rows = rows_of_share(chosen, share_of_length(stream.shape[1], self.capacity))
        elif is_tracing(stream) if memory is None else memory.is_compileable:
            return self.work_on_all(stream, inside, weight, chosen, documents, memory, context)
        else:
            rows = rows_of(chosen, documents)
        if memory is not None:
            memory.write(chosen.shape[1])  # first of all: what there was before is what may be returned to
        return self.work_on(rows, stream, inside, weight, memory, context)

    def decide(self, scores: torch.Tensor) -> torch.Tensor:
        """[batch, length, 1] -> bool"""
        return scores > 0

    def learn(self, stream, chosen, documents, side_loss: SideLoss | None, layer_idx: int) -> torch.Tensor:
        """A zero that carries the gradient of the predictor's loss: the binary cross-entropy of its answers."""
        if side_loss is None:  # a zero all the same, since DistributedDataParallel waits for every gradient
            return self.predictor(stream[:, :0].detach()).sum()
        scores = self.predictor(stream.detach()).squeeze(-1)
        scores = scores.to(wide(scores))
        loss = F.binary_cross_entropy_with_logits(scores, chosen.to(scores.dtype), reduction="none")
        documents = torch.ones_like(chosen, dtype=torch.long) if documents is None else documents
        each = (documents > 0).to(loss.dtype)
        if side_loss.by_document:
            lengths = torch.zeros_like(documents).scatter_add(1, documents, torch.ones_like(documents))
            each = each / lengths.gather(1, documents)
        loss, count = loss * each, each.sum()
        return side_loss.attach(layer_idx, loss.sum(), count)

    def work_on(self, rows: ChosenRows, stream, inside, weight, memory: ChosenCacheLayer | None, context: dict):
        """Only what is chosen is computed, as left-aligned rows."""
        if rows.nothing and not torch.is_grad_enabled() and not context.get("output_router_logits"):
            return stream
        tokens = rows.take(stream)
        positions = context["position_embeddings"]
        told = context | {
            "position_embeddings": type(positions)(*(rows.take(each) for each in positions)),
            "attention_mask": self.causal_mask(tokens),
            "documents": rows.real,
            "past_key_values": None,
        }
        if memory is not None:
            told |= self.remember(rows, tokens, memory)
        return rows.put(stream, torch.lerp(tokens, inside(tokens, **told), rows.take(weight)))

    def causal_mask(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Rows are left-aligned: no token sees what is past the end of its row."""
        told = {"attention_mask": None, "past_key_values": None, "position_ids": None}
        return create_causal_mask(config=self.config, inputs_embeds=tokens, **told)

    def remember(self, rows: ChosenRows, tokens: torch.Tensor, memory: ChosenCacheLayer) -> dict:
        """What attention is told of earlier tokens."""
        before = memory.read("memory_count")
        place = torch.arange(tokens.shape[1], device=tokens.device).expand(rows.index.shape)
        real = torch.ones_like(place, dtype=torch.bool) if rows.real is None else rows.real
        if before is None:
            last = rows.last
            row, place = rows.batch_row, torch.where(real, place, -1)
            count = rows.counts
            if last is not None:
                row, place, count = row[last], place[last], count[last]
            count = count.new_zeros(rows.batch).index_put((row,), count)
            return {"past_key_values": FirstKeys(memory, row, place, count, last)}
        place = before[rows.batch_row, None] + place
        count = before.index_add(0, rows.batch_row, rows.counts)
        shown = int(count[rows.batch_row].max())
        mask = None if place.numel() == 1 else self.mask(place + 1, shown, tokens)
        place = torch.where(real, place, -1)
        return {"attention_mask": mask, "past_key_values": RememberedKeys(memory, rows.batch_row, place, count, shown)}

    def mask(self, seen: torch.Tensor, keys: int, like: torch.Tensor) -> torch.Tensor:
        """[rows, 1, tokens, keys] where a token sees the first `seen` [rows, tokens] keys, for the kernel in use."""
        return self.as_asked(torch.arange(keys, device=seen.device) < seen[:, None, :, None], like)

    def as_asked(self, shown: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if self.config._attn_implementation != "eager":
            return shown
        return torch.zeros_like(shown, dtype=like.dtype).masked_fill(~shown, torch.finfo(like.dtype).min)

    def work_on_all(self, stream, inside, weight, chosen, documents, memory, context: dict) -> torch.Tensor:
        """The same where no shape may rest on values: all is computed, and what is not chosen is seen by no one."""
        batch, length = chosen.shape
        documents = chosen if documents is None else documents * chosen
        if memory is None:
            place, keys = torch.arange(length, device=chosen.device), None
            shown = (place <= place[:, None]) & chosen[:, None]
            shown = shown & (documents[:, None] == documents[..., None])
            mask = self.as_asked((shown | (place == place[:, None]))[:, None], stream)  # or some would see nothing
        else:
            before = memory.read("memory_count")
            seen = chosen.cumsum(1) if before is None else before[:, None] + chosen.cumsum(1)
            row = torch.arange(batch, device=chosen.device)
            keys = RememberedKeys(memory, row, torch.where(chosen, seen - 1, -1), seen[:, -1], None)
            mask = self.mask(seen.clamp(min=1), memory.max_cache_len + 1, stream)
        told = {"attention_mask": mask, "past_key_values": keys, "documents": documents}
        answer = inside(stream, **context | told)
        if memory is not None:
            memory.write(length)
        return torch.where(chosen[..., None], torch.lerp(stream, answer, weight), stream)
