"""Linear attention whose memory fades by a factor that each token sets for each head: the state-space duality of
Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060, section 6), gated linear attention with scalar gates.

    state_t = exp(log_decay_t) * state_(t-1) + gain_t * key_t^T value_t
    out_t = query_t state_t + skip * value_t

Shapes: query, key [batch, length, groups, key_dim], each shared by the heads of a group; value [batch, length, heads,
value_dim]; log_decay, 0 or less, and gain [batch, length, heads]; skip [heads], optional; state [batch, heads, key_dim,
value_dim], in float32 at least; documents [batch, length] as in `documents.py`: padding adds nothing and fades nothing,
the state is forgotten where a document starts, an initial state belongs to document 1.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .dispatch import accelerated
from .documents import document_runs, document_steps
from .fading import Fading, Links, fading_of_sums, linked
from .precision import without_autocast


def recurrent_decayed_attention(
    query, key, value, log_decay, gain, *, skip=None, documents=None, initial_state=None, output_final_state=False
):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    of_group = query.shape[2], value.shape[2] // query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        q, k, v, decay, gain = (x.to(wide) for x in (query, key, value, log_decay, gain))
        added, decay = (v * gain[..., None]).unflatten(2, of_group), decay.exp().unflatten(2, of_group)
        state = initial_state
        if state is None:
            state = v.new_zeros(v.shape[0], value.shape[2], k.shape[-1], v.shape[-1])
        state = state.unflatten(1, of_group)
        if documents is not None:
            real, starts = document_steps(documents)
        outputs = []
        for t in range(q.shape[1]):
            kept = decay[:, t, ..., None, None] * state
            if documents is not None:
                kept = kept * ~starts[:, t, None, None, None, None]
            after = kept.addcmul_(k[:, t, :, None, :, None], added[:, t, ..., None, :])
            state = after if documents is None else torch.where(real[:, t, None, None, None, None], after, state)
            outputs.append(q[:, t, :, None, None] @ state)
        output = torch.stack(outputs, dim=1).flatten(2, 3).squeeze(-2)
        output = output if skip is None else torch.addcmul(output, v, skip.to(wide)[:, None])
    return output.to(value.dtype), state.flatten(1, 2) if output_final_state else None


def fla_decayed_attention(simple_gla, query, key, value, log_decay, gain, *, skip=None, **options):
    """flash-linear-attention's kernel has a key for each head, one type for all three, a scale of its own, and neither
    gain nor skip."""
    query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], dim=2) for x in (query, key))
    added = (value * gain[..., None]).to(query.dtype)
    output, state = simple_gla(query, key, added, log_decay, scale=1.0, **options)
    output = output if skip is None else torch.addcmul(output, value, skip[:, None])
    return output.to(value.dtype), state


@accelerated("fla.ops.simple_gla:chunk_simple_gla", adapt=fla_decayed_attention)
def chunk_decayed_attention(
    query,
    key,
    value,
    log_decay,
    gain,
    *,
    skip=None,
    documents=None,
    initial_state=None,
    output_final_state=False,
    chunk_size=64,
):
    """The same answer in parallel: attention inside a chunk, the recurrence between chunks. Scores of queries and keys
    are made once for a group."""
    length, wide = value.shape[1], torch.promote_types(query.dtype, torch.float32)
    size = min(chunk_size, length)
    with without_autocast(query):
        sequences = [x.to(wide) for x in (query, key, value, log_decay, gain)]
        document = None
        if documents is not None:
            real, document = document_runs(documents, value)
            sequences[3:] = (x * real[..., None] for x in sequences[3:])
        if pad := -length % size:
            sequences = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)) for x in sequences]
        state = initial_state
        if state is None:
            state = value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[-1], dtype=wide)
        skip = value.new_zeros(value.shape[2], dtype=wide) if skip is None else skip.to(wide)
        output, state = DecayedAttention.apply(*sequences, skip, state, document, size, torch.is_grad_enabled())
        output = output[:, :length] if pad else output
    return output.to(value.dtype), state if output_final_state else None


class DecayedAttention(torch.autograd.Function):
    """(output, final state). Sequences are [batch, chunks * size, ...]; of all that is made of a chunk, only the state
    before it is kept for backward, which makes the rest again."""

    @staticmethod
    def forward(ctx, query, key, value, log_decay, gain, skip, state, document, size, trained):
        q, k, v, gains, fades = cut(size, query, key, value, log_decay, gain, document)
        groups, state = q.shape[2], grouped(state, q.shape[2])
        given = side_by_side(v * (fades.out_of * gains[..., None]), groups)
        carried = given.new_empty(given.shape)
        rooms = state.new_empty(len(q) if trained else 1, *state.shape).unbind()
        states = [state, *(rooms if trained else rooms * len(q))]
        steps = zip(*map(by_chunk, (q, k.mT, given, carried, fades.across)), states, states[1:], strict=False)
        for q_i, k_i, given_i, into, across, before, after in steps:
            torch.bmm(q_i, before.flatten(-2), out=into)
            kept = torch.mul(across, before, out=after).flatten(-2)
            torch.baddbmm(kept, k_i, given_i, out=kept)  # in place; torch counts the operations of this form alone
        own = weigh(fades.within.mul_(gains.transpose(2, 3)[..., None, :]), q @ k.mT)
        own.diagonal(dim1=-2, dim2=-1).add_(skip[:, None])
        output = unchunked(apart(carried, v).mul_(fades.into).add_((own @ v.transpose(2, 3)).transpose(2, 3)))
        state, ctx.size = ungrouped(states[-1], groups), size
        ctx.save_for_backward(query, key, value, log_decay, gain, skip, document, state, output, *states[:-1])
        return output, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, of_final):
        """A log decay scales what is read from its token on of what was taken in before it. So its gradient is a sum
        over the tokens from there on of what they read less what they give, each times its gradient."""
        with without_autocast(grad):
            saved = ctx.saved_tensors
            *tensors, skip, document, final, output, states = (*saved[:9], saved[9:])
            q, k, v, gains, fades = cut(ctx.size, *tensors, document)
            groups, grad, output = q.shape[2], *(x.unflatten(1, (-1, ctx.size)).transpose(0, 1) for x in (grad, output))
            by_head = grad.transpose(2, 3).contiguous()
            of_own = by_head @ v.permute(0, 1, 3, 4, 2)
            of_skip = of_own.diagonal(dim1=-2, dim2=-1).transpose(2, 3)  # [chunks, batch, size, heads]
            of_scores = of_own * fades.within * gains.transpose(2, 3)[..., None, :]
            of_scores = of_scores.unflatten(2, (groups, -1)).sum(3)
            of_query, of_key = of_scores @ k, of_scores.mT @ q

            of_state = grouped(of_final, groups)
            read = side_by_side(grad * fades.into, groups)
            given = side_by_side(v * (fades.out_of * gains[..., None]), groups)
            of_given = given.new_empty(given.shape)
            parts = map(by_chunk, (q.mT, k, read, given, of_query, of_key, of_given, fades.across))
            for q_i, k_i, read_i, given_i, of_q, of_k, into, across, state in list(zip(*parts, states, strict=True))[
                ::-1
            ]:
                of_q.baddbmm_(read_i, state.flatten(-2).mT)
                of_k.baddbmm_(given_i, of_state.flatten(-2).mT)
                torch.bmm(k_i, of_state.flatten(-2), out=into)
                of_state = (across * of_state).flatten(-2).baddbmm_(q_i, read_i).view_as(of_state)

            own = weigh(fades.within, q @ k.mT)
            of_added = apart(of_given, v).mul_(fades.out_of).add_((own.mT @ by_head).transpose(2, 3))
            of_gain = (v * of_added).sum(-1)
            of_value = of_added.mul_(gains[..., None]).addcmul_(grad, skip[:, None])
            through = (grad * output).sum(-1) - gains * of_gain - skip * of_skip
            of_decay = unchunked(through).flip(1).cumsum(1).flip(1) + (final * of_final).sum((-1, -2))[:, None]
            found = map(unchunked, (of_query.transpose(2, 3), of_key.transpose(2, 3), of_value, of_gain))
            of_query, of_key, of_value, of_gain = found
            of_skip, of_state = of_skip.sum((0, 1, 2)), ungrouped(of_state, groups)
        return of_query, of_key, of_value, of_decay, of_gain, of_skip, of_state, None, None, None


def cut(size: int, query, key, value, log_decay, gain, document) -> tuple:
    """Chunks: query and key [chunks, batch, groups, size, dim], value [chunks, batch, size, heads, dim], gain [chunks,
    batch, size, heads], and what is left of what: `into` and `out_of` lie as the values, `across` as the states."""
    sequences = (x.unflatten(1, (-1, size)).transpose(0, 1) for x in (query, key, value, log_decay, gain))
    query, key, value, log_decay, gain = sequences
    links = None if document is None else Links(*(x.transpose(0, 1) for x in linked(document, size)))
    within, into, out_of, across = fading_of_sums(log_decay.transpose(2, 3).cumsum(-1), links)
    across = across.unflatten(2, (query.shape[3], -1)).transpose(3, 4)
    fades = Fading(within, into.transpose(2, 3), out_of.transpose(2, 3), across)
    return query.transpose(2, 3), key.transpose(2, 3), value, gain, fades


def weigh(within: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """within [chunks, batch, heads, size, size], times the scores of each one's group, in its place."""
    within.unflatten(2, (scores.shape[2], -1)).mul_(scores[:, :, :, None])
    return within


def side_by_side(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[chunks, batch, size, heads, dim] -> [chunks, batch, groups, size, heads of a group * dim]: what the same keys
    are multiplied with."""
    return x.unflatten(3, (groups, -1)).flatten(-2).transpose(2, 3)


def apart(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse, in the shape of `like`."""
    return x.transpose(2, 3).reshape(like.shape)


def by_chunk(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[chunks, batch, groups, ...] -> [batch * groups, ...] of each chunk."""
    return x.flatten(1, 2).unbind(0)


def unchunked(x: torch.Tensor) -> torch.Tensor:
    """[chunks, batch, size, ...] -> [batch, length, ...]"""
    return x.transpose(0, 1).flatten(1, 2)


def grouped(state: torch.Tensor, groups: int) -> torch.Tensor:
    """[batch, heads, key_dim, dim] -> [batch * groups, key_dim, heads of a group, dim]."""
    return state.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 1).contiguous()


def ungrouped(state: torch.Tensor, groups: int) -> torch.Tensor:
    return state.unflatten(0, (-1, groups)).transpose(2, 3).flatten(1, 2)
