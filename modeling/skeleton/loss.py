"""Next-token loss without all logits at once: a chunk of tokens at a time, made again in backward; and the loss that
keeps experts equally busy."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # numbers, 64 MiB in float32


def next_tokens(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """labels [batch, length] moved one to the left: what each position should name."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]


def targets_of(labels: torch.Tensor, shift_labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    return (next_tokens(labels, ignore_index) if shift_labels is None else shift_labels).flatten()


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """The loss of transformers' `ForCausalLMLoss` on lm_head(hidden_states), with memory for LOGITS_AT_ONCE logits.

    hidden_states [batch, length, size], labels [batch, length]; the mean over labelled tokens, or, given
    `num_items_in_batch`, their sum over that number.
    """
    targets = targets_of(labels, shift_labels, ignore_index).to(hidden_states.device)
    tokens = hidden_states.flatten(0, 1)
    chunk = max(1, LOGITS_AT_ONCE // lm_head.out_features)

    def loss_of(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(lm_head(part).float(), target, ignore_index=ignore_index, reduction="sum")

    pairs = zip(tokens.split(chunk), targets.split(chunk), strict=True)
    total = sum(checkpoint(loss_of, part, target, use_reentrant=False) for part, target in pairs)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


def load_balancing(router_logits: Sequence[torch.Tensor], top_k: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """experts * sum over experts of (choices per token) * (mean probability): `top_k` where all are equally busy, more
    elsewhere (Fedus et al., 2021, arXiv:2101.03961, equations 4 to 6; over all layers at once, as in Mixtral).

    router_logits: [tokens, experts] of each layer; real [tokens] (bool, optional): those that are no padding.
    """
    chosen, probability = 0.0, 0.0
    for logits in router_logits:
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        taken = torch.zeros_like(scores).scatter_(-1, scores.topk(top_k, dim=-1).indices, 1.0)
        if real is not None:
            scores, taken = (each * real[:, None] for each in (scores, taken))
        chosen, probability = chosen + taken.sum(0), probability + scores.sum(0)
    tokens = len(router_logits) * (router_logits[0].shape[0] if real is None else real.sum())
    return router_logits[0].shape[-1] * (chosen / tokens * (probability / tokens)).sum()


def share_of_batch(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor | float:
    """How much of a batch that comes in pieces this piece is: a mean over tokens counts that much in the sum of their
    losses."""
    if num_items_in_batch is None:
        return 1.0
    return (targets_of(labels, shift_labels, ignore_index) != ignore_index).sum() / num_items_in_batch
