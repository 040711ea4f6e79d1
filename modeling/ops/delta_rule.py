"""The generalised delta rule of RWKV-7 (Peng et al., 2025, arXiv:2503.14456, equations 15 to 19): linear attention whose
memory fades by a factor per channel, and exchanges what it holds for a key against something else.

    state_t = diag(exp(log_decay_t)) state_(t-1) + b_t^T (a_t state_(t-1)) + key_t^T value_t      out_t = query_t state_t

With a = -key of norm 1, b = beta key and values times beta it is the gated delta rule (arXiv:2412.06464), with a and b of
zeros gated linear attention.

Shapes: query, log_decay, key, a, b [batch, length, heads, key_dim], log_decay finite and 0 or less; value [batch, length,
heads, value_dim]; state [batch, heads, key_dim, value_dim], in float32 at least; documents [batch, length] as in
`documents.py`: padding adds nothing and fades nothing, the state is forgotten where a document starts, an initial state
belongs to document 1.
"""

import torch
import torch.nn.functional as F
from transformers.utils.import_utils import is_tracing

from .dispatch import accelerated
from .documents import document_runs
from .fading import chunked, linked

CHUNK = 32
RANGE = 60.0  # how far apart the logarithms of two factors may be whose product float32 can hold


def recurrent_delta_rule(
    query, log_decay, key, value, a, b, *, documents=None, initial_state=None, output_final_state=False
):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    wide, state, outputs = torch.promote_types(query.dtype, torch.float32), initial_state, []
    with torch.autocast(query.device.type, enabled=False):
        q, decay, k, v, a, b = (x.to(wide) for x in (query, log_decay, key, value, a, b))
        decay = decay.exp()[..., None]
        if state is None:
            state = v.new_zeros(len(v), *k.shape[2:], v.shape[-1])
        if documents is not None:
            real, document = document_runs(documents, query)
            starts = document.diff(dim=1, prepend=torch.ones_like(document[:, :1])) != 0
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

    where A_x compares a with what x brought in before, and into_a is a of which that is left which S is. So u = W S + U,
    and what is left of S, key^T value and b^T u are the state after the chunk: only that goes from chunk to chunk.
    """
    length, wide = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    size = min(CHUNK, 1 << (length - 1).bit_length())
    with torch.autocast(query.device.type, enabled=False):
        document = None
        if documents is not None:
            real, document = document_runs(documents, query)
            log_decay, value, b = (x * real[..., None, None] for x in (log_decay, value, b))
        sums = F.pad(chunked(log_decay.to(wide), size), (0, 0, 1, 0)).cumsum(-2)  # one more: before the first step
        q, k, v, a, b = (chunked(x.to(wide), size) for x in (query, key, value, a, b))
        rows, columns, scores, scales = within_chunks((q, a), (k, b), sums, direct_size(log_decay, size))
        rows, columns, scores, scales = cut((rows, columns, scores, scales), document, size)
        (query_k, query_b, a_k, a_b), v = scores, v.contiguous()
        solved = torch.linalg.solve_triangular(-a_b, eye_like(a_b), upper=False, unitriangular=True)
        W, U = solved @ rows[1], solved @ a_k @ v
        before, u, state = carry_through(W, U, columns[0].mT @ v, columns[1].mT, scales, initial_state)
        output = rows[0] @ before + query_k @ v + query_b @ u
        output = output.transpose(2, 3).flatten(1, 2)[:, :length]
    return output.to(value.dtype), state if output_final_state else None


def within_chunks(rows, columns, sums, direct: int) -> tuple[tuple, tuple, list, tuple]:
    """What the chunk is made of, from rows (queries, a) and columns (keys, b) [..., size, key_dim] and the sums of log
    decays [..., size + 1, key_dim] before each step and after the last.

    Rows scaled to meet a state and columns scaled to be added to one; their scores; and the scales of states: of one
    that rows meet, of one that goes on, and of what columns add to it.
    """
    start, end = sums[..., :1, :], sums[..., -1:, :]
    if sums.shape[-2] - 1 <= direct:  # the scores compare rows and columns as they are scaled for states
        into = out_of = end / 2
        rows, columns = seen_from(rows, sums, into), seen_to(columns, sums, out_of)
        scores = against(rows, columns)
    else:
        scores, into, out_of = compared(rows, columns, sums, direct), start, end
        rows, columns = seen_from(rows, sums, into), seen_to(columns, sums, out_of)
    seen = torch.ones_like(scores[0][(0,) * (scores[0].ndim - 2)]).tril()
    scores = [score * mask for score, mask in zip(scores, (seen, seen, seen.tril(-1), seen.tril(-1)), strict=True)]
    return rows, columns, scores, tuple(x.exp().mT for x in (into, end, end - out_of))


def compared(rows, columns, sums, direct: int) -> list[torch.Tensor]:
    """Every row against every column, [..., size, size] each: products in which exp(sum of the log decays between) is left
    of a column. What lies above the diagonal means nothing, but is finite.

    No factor is large: up to `direct` steps are measured from the middle of all their decay. Of more steps the halves are
    compared by themselves, and the second with the first, measured from the border between them.
    """
    size = sums.shape[-2] - 1
    if size == 1:
        return against(rows, columns)  # nothing lies between
    if size <= direct:
        middle = (sums[..., :1, :] + sums[..., -1:, :]) / 2
        return against(seen_from(rows, sums, middle), seen_to(columns, sums, middle))
    half = size // 2
    border = sums[..., half : half + 1, :]
    second = seen_from([x[..., half:, :] for x in rows], sums[..., half:, :], border)
    first = seen_to([x[..., :half, :] for x in columns], sums[..., : half + 1, :], border)
    halves = ([x.unflatten(-2, (2, half)) for x in vectors] for vectors in (rows, columns))
    own = compared(*halves, sums.unfold(-2, half + 1, half).mT, direct)
    return [
        torch.cat((F.pad(mine[..., 0, :, :], (0, half)), torch.cat((across, mine[..., 1, :, :]), dim=-1)), dim=-2)
        for mine, across in zip(own, against(second, first), strict=True)
    ]


def against(rows, columns) -> list[torch.Tensor]:
    return [row @ column.mT for row in rows for column in columns]


def seen_from(rows, sums, origin) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, a), as far as what is at `origin` is left at them: a query comes after its step, a before."""
    left = (sums - origin).exp()
    return left[..., 1:, :] * rows[0], left[..., :-1, :] * rows[1]


def seen_to(columns, sums, origin) -> list[torch.Tensor]:
    """(keys, b), as far as they are left at `origin`."""
    left = (origin - sums[..., 1:, :]).exp()
    return [left * column for column in columns]


def cut(parts: tuple, document: torch.Tensor | None, size: int) -> tuple:
    """The parts of `within_chunks`, where nothing goes from one document into another."""
    if document is None:
        return parts
    (rows, columns, scores, (into, across, added)), links = parts, linked(document, size)
    rows, columns = ([x * mask for x in vectors] for vectors, mask in ((rows, links.into), (columns, links.out_of)))
    return rows, columns, [x * links.within for x in scores], (into, across * links.into[..., -1:, :], added)


def direct_size(log_decay: torch.Tensor, size: int) -> int:
    """How many steps may be compared at once: a chunk where memory fades as slowly as in RWKV-7, and one where it would
    take tracing to know."""
    steepest = RANGE if is_tracing(log_decay) else -float(log_decay.detach().amin())
    while size > 1 and size * steepest > RANGE:
        size //= 2
    return size


def eye_like(matrices: torch.Tensor) -> torch.Tensor:
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)


def carry_through(W, U, added, b, scales, state) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The recurrence between chunks: the states that the chunks meet [batch, chunks, heads, key_dim, value_dim], the u of
    their steps, and the state at the end."""
    if state is None:
        state = torch.zeros_like(added[:, 0])
    met, answers = [], []
    for w, own, brought, back, (into, across, scale) in zip(
        *(x.unbind(1) for x in (W, U, added, b)), zip(*(x.unbind(1) for x in scales), strict=True), strict=True
    ):
        met.append(into * state)
        answers.append(own + w @ met[-1])
        state = across * state + scale * (brought + back @ answers[-1])
    return torch.stack(met, dim=1), torch.stack(answers, dim=1), state
