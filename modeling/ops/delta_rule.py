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
from .fading import in_chunks, linked

CHUNK = 64
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
    """The same answer in parallel. With u_t = a_t state_(t-1) and S the state before a chunk, all of the chunk is linear:
    u = into_a S + A_ak value + A_ab u, where A_xy compares x with what y brought in before, and into_x is x as far as S is
    left. One triangular system gives u = W S + U, the state after the chunk is then a matrix times S and something added,
    and only that goes from chunk to chunk."""
    length, wide = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    size = min(CHUNK, 1 << (length - 1).bit_length())
    with torch.autocast(query.device.type, enabled=False):
        if documents is not None:
            real, document = document_runs(documents, query)
            log_decay, value, b = (x * real[..., None, None] for x in (log_decay, value, b))
        left, v = (in_chunks(x.to(wide), size) for x in (log_decay, value))
        left = left.cumsum(-2)
        last = left[..., -1:, :]
        rows, columns = (torch.stack([in_chunks(x.to(wide), size) for x in pair], 3) for pair in ((query, a), (key, b)))
        scores = compared(rows, columns, left, direct_size(log_decay, size))
        within, into, out_of, across = earlier(size, left), faded(left.exp()), (last - left).exp(), last.exp()
        if documents is not None:
            links = linked(document, size)
            within, into = within * links.within.repeat(1, 1, 1, 1, 2)[:, :, :, None], into * links.into[:, :, :, None]
            out_of, across = out_of * links.out_of, across * links.into[..., -1:, :]
        scores, rows, columns = scores.mul_(within), rows * into, columns * out_of[:, :, :, None]
        (into_query, into_a), (k, b) = rows.unbind(3), columns.unbind(3)
        of_query, of_a = scores.unbind(3)  # [..., size, 2 * size], with values and with u
        system = torch.cat((into_a, of_a[..., :size] @ v), dim=-1)
        system = torch.linalg.solve_triangular(-of_a[..., size:], system, upper=False, unitriangular=True)
        W, U = system.split((left.shape[-1], v.shape[-1]), dim=-1)
        across = torch.diag_embed(across.squeeze(-2)) + b.mT @ W
        before, state = carry_through(across, b.mT @ U + k.mT @ v, initial_state)
        output = into_query @ before + of_query @ torch.cat((v, U + W @ before), dim=-2)
        output = output.transpose(2, 3).flatten(1, 2)[:, :length]
    return output.to(value.dtype), state if output_final_state else None


def compared(rows: torch.Tensor, columns: torch.Tensor, left: torch.Tensor, direct: int) -> torch.Tensor:
    """Products [..., 2, size, 2 * size] of rows (the queries, a) and columns (the keys, b), both [..., 2, size, key_dim], of
    which a row sees what is left of a column: exp(left_i - left_j) with query i and column j, exp(left_(i-1) - left_j)
    with a_i. `left` [..., size, key_dim] is the sum of log decays up to a step. Whatever lies above the diagonal means
    nothing, but is finite.

    No factor is large: `direct` steps are measured from the middle between their ends, and of more steps the two halves by
    themselves, then the second against the first, from the border between them.
    """
    size = rows.shape[-2]
    if size <= direct:
        middle = (left[..., :1, :] + left[..., -1:, :]) / 2
        rows, columns = rows * faded((left - middle).exp()), columns * (middle - left).exp()[..., None, :, :]
        return (rows.flatten(-3, -2) @ columns.flatten(-3, -2).mT).unflatten(-2, (2, size))
    half = size // 2
    border = left[..., half - 1 : half, :]
    second = rows[..., half:, :] * faded((left[..., half:, :] - border).exp())
    first = columns[..., :half, :] * (border - left[..., :half, :]).exp()[..., None, :, :]
    across = (second.flatten(-3, -2) @ first.flatten(-3, -2).mT).view(*second.shape[:-1], 2, half)
    halves = [x.unflatten(-2, (2, half)) for x in (rows, columns, left)]
    halves[:2] = (x.transpose(-4, -3) for x in halves[:2])
    own = compared(*halves, direct).unflatten(-1, (2, half))  # [..., halves, 2, half, 2, half]
    upper, lower = own.unbind(-5)
    whole = torch.cat((F.pad(upper, (0, half)), torch.cat((across, lower), dim=-1)), dim=-3)
    return whole.flatten(-2)


def faded(factor: torch.Tensor) -> torch.Tensor:
    """[..., size, key_dim] of what is left at each step -> [..., 2, size, key_dim]: for a query, which comes after its step,
    and for a, which comes before it."""
    return torch.stack((factor, F.pad(factor[..., :-1, :], (0, 0, 1, 0), value=1.0)), dim=-3)


def direct_size(log_decay: torch.Tensor, size: int) -> int:
    """How many steps may be compared at once: all where memory fades as slowly as in RWKV-7, and one where it would take
    tracing to know."""
    steepest = RANGE if is_tracing(log_decay) else -float(log_decay.detach().amin())
    while size > 1 and (size - 1) * steepest > RANGE:
        size //= 2
    return size


def earlier(size: int, like: torch.Tensor) -> torch.Tensor:
    """[2, size, 2 * size]: a query sees its own step and those before, a those before."""
    seen = like.new_ones(size, size).tril()
    return torch.stack((seen, seen.tril(-1))).repeat(1, 1, 2)


def carry_through(across: torch.Tensor, added: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The recurrence between chunks, state = across @ state + added: the states [batch, chunks, heads, key_dim, value_dim] at
    the starts of the chunks, and the one at the end."""
    state, before = torch.zeros_like(added[:, 0]) if state is None else state.to(added.dtype), []
    for matrix, more in zip(across.unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = torch.baddbmm(more.flatten(0, 1), matrix.flatten(0, 1), state.flatten(0, 1)).view_as(state)
    return torch.stack(before, dim=1), state
