"""The generalised delta rule of RWKV-7 (Peng et al., 2025, arXiv:2503.14456, section 3): linear attention whose memory
fades by a factor per channel, and exchanges what it holds for a key against something else.

    state_t = diag(exp(log_decay_t)) state_(t-1) + b_t^T (a_t state_(t-1)) + key_t^T value_t
    out_t = query_t state_t

With a = -key of norm 1, b = beta exp(log_decay) key and values times beta it is the gated delta rule (Yang et al.,
2024, arXiv:2412.06464), with a and b of zeros gated linear attention.

Shapes: query, log_decay, key, a, b [batch, length, heads, key_dim], log_decay finite and 0 or less; value [batch,
length, heads, value_dim]; state [batch, heads, key_dim, value_dim], in float32 at least; documents [batch, length] as
in `documents.py`: padding adds nothing and fades nothing, the state is forgotten where a document starts, an initial
state belongs to document 1.
"""

import torch
import torch.nn.functional as F
from transformers.utils.import_utils import is_tracing

from .dispatch import accelerated
from .documents import document_runs, document_steps
from .fading import chunked, linked
from .precision import without_autocast

DELTA_CHUNK = 32
FEW = 8  # steps whose differences are all computed, where decays may be of any size
RANGE = 60.0  # the largest logarithm of a factor that float32 holds with room for sums of products


def recurrent_delta_rule(
    query, log_decay, key, value, a, b, *, documents=None, initial_state=None, output_final_state=False
):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    wide, state, outputs = torch.promote_types(query.dtype, torch.float32), initial_state, []
    with without_autocast(query):
        q, decay, k, v, a, b = (x.to(wide) for x in (query, log_decay, key, value, a, b))
        decay = decay.exp()[..., None]
        if state is None:
            state = v.new_zeros(v.shape[0], *k.shape[2:], v.shape[-1])
        if documents is not None:
            real, starts = document_steps(documents)
        for t in range(q.shape[1]):
            before = state if documents is None else state * ~starts[:, t, None, None, None]
            kept = torch.addcmul(decay[:, t] * before, b[:, t, :, :, None], a[:, t, :, None, :] @ before)
            after = torch.addcmul(kept, k[:, t, :, :, None], v[:, t, :, None, :])
            state = after if documents is None else torch.where(real[:, t, None, None, None], after, state)
            outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1).to(value.dtype), state if output_final_state else None


@accelerated("fla.ops.rwkv7:chunk_rwkv7")
def chunk_delta_rule(
    query, log_decay, key, value, a, b, *, documents=None, initial_state=None, output_final_state=False
):
    """The same answer in parallel. With u_t = a_t state_(t-1), and S the state before a chunk, u of the chunk solves

        u = into_a S + A_k value + A_b u,

    where A_x compares a with what x brought in before, and into_a sees of S what is left at its step. So u = W S + U,
    and what is left of S, key^T value and b^T u are the state after the chunk: only that goes from chunk to chunk.
    """
    length, wide = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    size = min(DELTA_CHUNK, 1 << (length - 1).bit_length())
    with without_autocast(query):
        if documents is not None:
            real, document = document_runs(documents, query)
            log_decay, value, b = (x * real[..., None, None] for x in (log_decay, value, b))
        # [chunks, batch, heads, size, dim], one more of the sums: before the first step
        decays, v, q, k, a, b = (chunks_first(x.to(wide), size) for x in (log_decay, value, query, key, a, b))
        sums, v = decays.new_ones(size + 1, size).tril(-1) @ decays, v.contiguous()
        into, out_of, across, scores = related((q, a), (k, b), sums, direct_size(log_decay, size))
        if documents is not None:
            within, entering, leaving = (mask.transpose(0, 1) for mask in linked(document, size))
            scores, across = [score * within for score in scores], across * entering[..., -1:, :]
            into, out_of = [x * entering for x in into], [x * leaving for x in out_of]
        query_k, query_b, a_k, a_b = scores
        identity = torch.eye(size, dtype=wide, device=v.device).expand_as(a_b)
        solved = torch.linalg.solve_triangular(-a_b, identity, upper=False, unitriangular=True)
        W, U, added = solved @ into[1], solved @ (a_k @ v), out_of[0].mT @ v
        if initial_state is None:
            initial_state = torch.zeros_like(added[0])
        states, u = CarryThrough.apply(W, U, across.mT, added, out_of[1], initial_state.to(wide))
        before, state = states.split((len(added), 1))
        output = (into[0] @ before).flatten(0, 2).baddbmm_(query_k.flatten(0, 2), v.flatten(0, 2))
        output = output.baddbmm_(query_b.flatten(0, 2), u.flatten(0, 2)).view_as(v)
        output = output.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return output.to(value.dtype), state[0] if output_final_state else None


def related(rows, columns, sums, direct: int) -> tuple:
    """Of rows (queries, a) and columns (keys, b) [..., size, key_dim] in chunks with sums of log decays [..., size + 1,
    key_dim]: rows as they meet the state before, columns as they are left after, what is left of the state
    [..., 1, key_dim], and the scores [..., size, size] of each row with each column, zero where it comes later."""
    last = sums[..., -1:, :]
    into, across = seen_from(rows, sums), last.exp()
    if sums.shape[-2] - 1 <= direct:
        out_of = seen_to(columns, sums, 0)
        scores, out_of = against(into, out_of), [x * across for x in out_of]
    else:
        scores, out_of = compared(rows, columns, sums, direct), seen_to(columns, sums, last)
    for score, diagonal in zip(scores, (0, 0, -1, -1), strict=True):
        score.tril_(diagonal)
    return into, out_of, across, scores


class CarryThrough(torch.autograd.Function):
    """The recurrence between chunks, u = W S + U and S = across * S + added + b^T u: the states before each chunk and
    after the last, and the u of all steps.

    W, b [chunks, batch, heads, size, key_dim], U [..., size, value_dim], across [..., key_dim, 1], added [..., key_dim,
    value_dim]. Not left to autograd, since backward goes through the chunks likewise, and makes the rest of all chunks
    at once.
    """

    @staticmethod
    def forward(ctx, W, U, across, added, b, state):
        states = added.new_empty(len(added) + 1, *added.shape[1:])
        states[0], answers = state, U.new_empty(U.shape)
        flat = [x.flatten(1, 2) for x in (W, U, across, added, b, answers, states[:-1], states[1:])]
        for w, own, left, more, back, u, before, after in zip(*(x.unbind(0) for x in flat), strict=True):
            torch.baddbmm(own, w, before, out=u)
            torch.addcmul(more, left, before, out=after).baddbmm_(back.mT, u)
        ctx.save_for_backward(W, across, b, states, answers)
        return states, answers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_states, of_answers):
        W, across, b, states, answers = ctx.saved_tensors
        grads, of_u = states.new_empty(states.shape), answers.new_empty(answers.shape)
        grads[-1], before = of_states[-1], states[:-1]
        flat = [x.flatten(1, 2) for x in (W, across, b, of_states[:-1], of_answers, of_u, grads[1:], grads[:-1])]
        for w, left, back, met, answer, u, after, grad in zip(*(reversed(x.unbind(0)) for x in flat), strict=True):
            torch.baddbmm(answer, back, after, out=u)
            torch.addcmul(met, left, after, out=grad).baddbmm_(w.mT, u)
        of_added = grads[1:]
        of_across = (of_added * before).sum(-1, keepdim=True)
        return of_u @ before.mT, of_u, of_across, of_added, answers @ of_added.mT, grads[0]


def compared(rows, columns, sums, direct: int) -> list[torch.Tensor]:
    """Every row (queries, a) against every column (keys, b) [..., size, key_dim]: products [..., size, size], in which
    exp(the sum of the log decays between) is left of a column. `sums` [..., size + 1, key_dim] are those of the log
    decays before each step and after the last. What lies above the diagonal means nothing, but is finite.

    No factor is large: up to `direct` steps are measured from their start, a few by all differences. Of more steps the
    halves are compared by themselves, and the second with the first, measured from the border between them.
    """
    size = sums.shape[-2] - 1
    if size <= direct:
        start = sums[..., :1, :]
        return against(seen_from(rows, sums - start), seen_to(columns, sums, start))
    if size <= FEW:
        places = sums[..., 1:, None, :], sums[..., :-1, None, :]
        between = ((place - sums[..., None, 1:, :]).clamp(max=0).exp() for place in places)
        left = [row[..., None, :] * factor for row, factor in zip(rows, between, strict=True)]
        return [(row * column[..., None, :, :]).sum(-1) for row in left for column in columns]
    half = size // 2
    border = sums[..., half : half + 1, :]
    second = seen_from([x[..., half:, :] for x in rows], sums[..., half:, :] - border)
    first = seen_to([x[..., :half, :] for x in columns], sums[..., : half + 1, :], border)
    halves = ([x.unflatten(-2, (2, half)) for x in vectors] for vectors in (rows, columns))
    own = compared(*halves, sums.unfold(-2, half + 1, half).mT, direct)
    return [
        torch.cat((F.pad(mine[..., 0, :, :], (0, half)), torch.cat((across, mine[..., 1, :, :]), dim=-1)), dim=-2)
        for mine, across in zip(own, against(second, first), strict=True)
    ]


def against(rows, columns) -> list[torch.Tensor]:
    return [row @ column.mT for row in rows for column in columns]


def seen_from(rows, sums) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, a), as far as what is where the sums are 0 is left at them: a query comes after its step, a before."""
    left = sums.exp()
    return left[..., 1:, :] * rows[0], left[..., :-1, :] * rows[1]


def seen_to(columns, sums, place) -> list[torch.Tensor]:
    """(keys, b), as far as they are left where the sum is `place`."""
    left = (place - sums[..., 1:, :]).exp()
    return [left * column for column in columns]


def direct_size(log_decay: torch.Tensor, size: int) -> int:
    """How many steps may be measured from one place: all of a chunk where memory fades as slowly as in RWKV-7, and none
    where tracing does not tell."""
    if is_tracing(log_decay) or log_decay.is_meta:
        return 0
    steepest = -float(log_decay.detach().amin())
    while size * steepest > RANGE:
        size //= 2
    return size


def chunks_first(x: torch.Tensor, size: int) -> torch.Tensor:
    """[batch, length, heads, dim] -> [chunks, batch, heads, size, dim]."""
    return chunked(x, size).transpose(0, 1)
