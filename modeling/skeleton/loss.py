"""Next-token loss without all logits at once: a chunk of tokens at a time, made again in backward."""

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


def per_label(labels: torch.Tensor, **kwargs) -> torch.Tensor:
    """What a sum over tokens is multiplied by beside a mean over labelled tokens, so that the pieces of a batch add up:
    arguments as of `share_of_batch`."""
    named = (targets_of(labels, kwargs.get("shift_labels"), -100) != -100).sum()
    return share_of_batch(labels, **kwargs) / named.clamp(min=1)


def share_of_batch(
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor | float:
    """How much of a batch that comes in pieces this piece is: a mean over tokens counts that much in the sum of their
    losses."""
    if labels is None or num_items_in_batch is None:
        return 1.0
    return (targets_of(labels, shift_labels, ignore_index) != ignore_index).sum() / num_items_in_batch
