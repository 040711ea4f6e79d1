"""Tokens in another order for each head and round, and attention among them in blocks: what `bucketed_attention.py` and
`sorted_attention.py` share. Gradients go back along the same ways, rather than being added up one by one."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

HIDDEN = -1e30  # in the place of a score: a row of nothing else is an answer that nobody reads
ITSELF = -1e5  # added to a token's score of itself where it should see others


class Arrangement(NamedTuple):
    """Where tokens go, and come back from."""

    there: torch.Tensor  # [batch * heads * rounds * padded] the token that takes a place, counted over batch and heads
    home: torch.Tensor  # [batch * length * heads * rounds] the place of each token
    shape: tuple[int, int, int, int]  # batch, length, heads, rounds
    padded: int  # places of a row, of which the last may be of no token

    def arrange(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        """[batch, length, heads, dim] -> [room + batch * heads * rounds * padded, dim]."""
        there = F.pad(self.there, (room, 0)) if room else self.there
        return Rearranged.apply(x.flatten(0, 2), there, self.home + room, self.shape[3])

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """[batch * heads * rounds * padded, dim] -> [batch, length, heads, rounds, dim]."""
        rounds = self.shape[3]
        turn = torch.arange(rounds, device=x.device)[:, None].expand(-1, self.padded).flatten()
        origin = (self.there.unflatten(0, (-1, rounds * self.padded)) * rounds + turn).flatten()
        return Rearranged.apply(x, self.home, origin, 1).view(*self.shape, -1)


def arrangement_by(column: torch.Tensor, heads: int, padded: int) -> Arrangement:
    """`column` [batch, heads or 1, rounds, length] of the tokens in their new order."""
    batch, _, rounds, length = column.shape
    row = torch.arange(batch, device=column.device)[:, None, None, None]
    head = torch.arange(heads, device=column.device)[:, None, None]
    there = F.pad((row * length + column) * heads + head, (0, padded - length))
    position = torch.arange(length, device=column.device).expand_as(column)
    place = torch.empty_like(column).scatter_(-1, column, position)
    starts = torch.arange(batch * heads * rounds, device=column.device).view(batch, heads, rounds, 1) * padded
    home = (place + starts).permute(0, 3, 1, 2)
    return Arrangement(there.flatten(), home.flatten(), (batch, length, heads, rounds), padded)


class Rearranged(torch.autograd.Function):
    """x [rows, dim] at the rows `there`; `home` says where in the answer the `copies` of each row are."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, there: torch.Tensor, home: torch.Tensor, copies: int) -> torch.Tensor:
        ctx.save_for_backward(home)
        ctx.copies = copies
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (home,) = ctx.saved_tensors
        gradient = gradient.index_select(0, home)
        return gradient if ctx.copies == 1 else gradient.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Windows(torch.autograd.Function):
    """x [back + rows, dim] as [rows / size, back + size, dim]: each `size` rows with those before them."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, size: int, back: int) -> torch.Tensor:
        ctx.sizes = size, back
        return x.unfold(0, back + size, size).transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (size, back), (chunks, _, dim) = ctx.sizes, gradient.shape
        total = gradient.new_zeros(back + chunks * size, dim)
        for start in range(back, -size, -size):  # a part of all windows at a time
            first = max(start, 0)
            part = gradient[:, first : start + size]
            total[first : first + chunks * size].view(chunks, size, dim)[:, : part.shape[1]] += part
        return total, None, None


class WeightsAndNormalizer(torch.autograd.Function):
    """softmax(scores), and log(sum(exp(scores))) [..., 1], by which parts of a softmax are joined."""

    @staticmethod
    def forward(ctx, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        return weights, scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()

    @staticmethod
    def backward(ctx, of_weights: torch.Tensor, of_normalizer: torch.Tensor) -> torch.Tensor:
        (weights,) = ctx.saved_tensors
        shared = torch.linalg.vecdot(weights, of_weights)[..., None] - of_normalizer
        return (of_weights - shared).mul_(weights)


def attend_to_windows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    joined: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What queries [chunks, heads, queries, dim] answer where a mask [chunks, 1, queries, keys] is added to their
    scores, and a normalizer [chunks, heads, queries, 1] where answers are to be `joined` with others."""
    if not joined:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=1.0), None
    scores = query @ key.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + mask
    weights, normalizer = weigh_scores(scores, joined)
    return F.dropout(weights, dropout).to(value.dtype) @ value, normalizer


def least_of(dtype: torch.dtype) -> float:
    """What is added to a token's score of itself where it should see others."""
    return max(ITSELF, torch.finfo(dtype).min / 2)


def weigh_scores(scores: torch.Tensor, joined: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of scores, and a normalizer where they are to be joined with others."""
    return WeightsAndNormalizer.apply(scores) if joined else (scores.softmax(-1), None)


def join_rounds(output: torch.Tensor, normalizer: torch.Tensor | None) -> torch.Tensor:
    """[batch, length, heads, rounds, dim] -> [batch, length, heads, dim]: a softmax over what all rounds show."""
    return output.squeeze(3) if normalizer is None else (output * normalizer.softmax(3).to(output.dtype)).sum(3)


def weights_of(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, sees_itself: bool) -> torch.Tensor:
    """The weights [batch, heads, queries, keys] of queries that see each key `seen` [batch, heads or 1, queries, keys]
    times."""
    scores = torch.einsum("bihd,bjhd->bhij", query, key)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    wide = wide + seen.to(wide.dtype).log()
    if not sees_itself:
        wide.diagonal(dim1=-2, dim2=-1).add_(ITSELF)
    return wide.softmax(-1).to(scores.dtype)
