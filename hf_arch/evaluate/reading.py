"""Reads texts in pieces through the cache: a model whose state is bounded needs bounded memory at any length."""

import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache

ROWS = 4  # texts that are read at once
SAMPLE = 48  # tokens that are enough to see whether pieces are read as a whole


class Reading(NamedTuple):
    """Of the last tokens of some texts, [texts, tokens]."""

    nats: torch.Tensor  # -log p(token | what is before it)
    right: torch.Tensor  # whether no other token was more probable


class Reader:
    """A causal language model that is told texts of any length, `piece` tokens at a time.

    `in_pieces` is False after `check` found that the model has no cache, or one whose answers are not those of a pass
    over the whole: then a text is one pass, whatever memory that takes.
    """

    def __init__(self, model: nn.Module, piece: int = 512):
        self.model, self.piece = model.eval(), piece
        named = inspect.signature(model.forward).parameters
        self.in_pieces = "past_key_values" in named
        self.keeps_few_logits = "logits_to_keep" in named

    @torch.no_grad()
    def check(self, tokens: torch.Tensor) -> None:
        """Look at how the model answers [1, tokens]. Raises ValueError where it sees the future."""
        tokens = tokens[:, :SAMPLE].to(self.model.device)
        whole = self.model(input_ids=tokens).logits
        other = tokens.clone()
        other[:, -1] = (other[:, -1] + 1) % whole.shape[-1]
        if differ(self.model(input_ids=other).logits[:, :-1], whole[:, :-1]):
            raise ValueError("The model sees the future: it is no causal language model, and has no bits per byte.")
        self.in_pieces = self.in_pieces and not self.pieces_differ(tokens, whole)

    def pieces_differ(self, tokens: torch.Tensor, whole: torch.Tensor) -> bool:
        cache, logits = None, []
        for part in tokens.split(-(-tokens.shape[1] // 3), dim=1):
            outputs = self.model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = getattr(outputs, "past_key_values", None)
            if cache is None:
                return True
            logits.append(outputs.logits)
        return differ(torch.cat(logits, dim=1), whole)

    def read(self, texts: torch.Tensor, last: int | None = None) -> Reading:
        """How the `last` tokens of [texts, length] are predicted; by default all but the first."""
        last = texts.shape[1] - 1 if last is None else last
        readings = [self.read_rows(rows.to(self.model.device), last) for rows in texts.split(ROWS)]
        return Reading(*(torch.cat(parts).cpu() for parts in zip(*readings, strict=True)))

    @torch.no_grad()
    def memory(self, texts: torch.Tensor) -> Cache:
        """What the model holds of [texts, length], read in pieces: its cache."""
        cache = None
        told = {"logits_to_keep": 1} if self.keeps_few_logits else {}
        for part in texts.to(self.model.device).split(self.piece, dim=1):
            cache = self.model(input_ids=part, past_key_values=cache, use_cache=True, **told).past_key_values
        return cache

    @torch.no_grad()
    def read_rows(self, tokens: torch.Tensor, last: int) -> Reading:
        end, cache, nats, right = tokens.shape[1] - 1, None, [], []
        piece = self.piece if self.in_pieces else end
        for start in range(0, end, piece):
            stop = min(start + piece, end)
            asked = stop - max(start, end - last)  # of this piece's answers, at its end
            told = {"past_key_values": cache, "use_cache": True} if self.in_pieces else {}
            told |= {"logits_to_keep": max(asked, 1)} if self.keeps_few_logits else {}
            outputs = self.model(input_ids=tokens[:, start:stop], **told)
            cache = outputs.past_key_values if self.in_pieces else None
            if asked > 0:
                logits, targets = outputs.logits[:, -asked:].float(), tokens[:, stop - asked + 1 : stop + 1]
                nats.append(cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
                right.append(logits.argmax(-1) == targets)
        return Reading(torch.cat(nats, dim=1), torch.cat(right, dim=1))


def differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """By more than rounding: a state that was forgotten, a future that was seen, change logits by their own size."""
    scale = expected.float().std()
    tolerance = 1e-2 if expected.dtype in (torch.float32, torch.float64) else 0.3
    return not ((found - expected).abs().max() <= tolerance * scale + 1e-6)  # so that nan differs
