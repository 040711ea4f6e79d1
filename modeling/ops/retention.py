"""Retention (Sun et al., 2023, arXiv:2307.08621, equations 5-7): linear attention whose memory fades by a fixed factor
per step and head.

    state_t = gamma * state_(t-1) + key_t^T value_t          out_t = query_t state_t / sqrt(key_dim)

Shapes: query, key [batch, length, heads, key_dim]; value [batch, length, heads, value_dim];
state [batch, heads, key_dim, value_dim], in float32 at least; documents [batch, length] as in `documents.py`: padding
adds nothing and fades nothing, the state is forgotten where a document starts, an initial state belongs to document 1.
The factors are the official code's, gamma = 1 - 2^(-5-head).
"""

import torch
import torch.nn.functional as F

from .dispatch import accelerated
from .documents import document_runs


def retention_decay(num_heads: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The gamma of each head, exact in float32 for up to 19 heads."""
    return 1 - torch.exp2(torch.arange(-5, -5 - num_heads, -1, device=device, dtype=dtype))


def recurrent_retention(query, key, value, *, documents=None, initial_state=None, output_final_state=False):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    batch, length, heads, key_dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = query.to(wide) * key_dim**-0.5, key.to(wide), value.to(wide)
        gamma = retention_decay(heads, query.device, wide)[:, None, None]
        state = initial_state
        if state is None:
            state = q.new_zeros(batch, heads, key_dim, v.shape[-1])
        if documents is not None:
            real, document = document_runs(documents, query)
            starts = document.diff(dim=1, prepend=torch.ones_like(document[:, :1])) != 0
        outputs = []
        for t in range(length):
            kept = gamma * state
            if documents is not None:
                kept = kept * ~starts[:, t, None, None, None]
            after = torch.addcmul(kept, k[:, t, :, :, None], v[:, t, :, None, :])
            state = after if documents is None else torch.where(real[:, t, None, None, None], after, state)
            outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1).to(value.dtype), state if output_final_state else None


@accelerated("fla.ops.retention:chunk_retention")
def chunk_retention(query, key, value, *, documents=None, initial_state=None, output_final_state=False, chunk_size=64):
    """The same answer in parallel: attention inside a chunk, the recurrence between chunks."""
    length, wide = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        within, into, out_of, across = retention_fading(query, documents, min(chunk_size, length), wide)
        if documents is not None:
            key = key * (documents > 0)[..., None, None]
        q, k, v = (in_chunks(x.to(wide), within.shape[-1]) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5
        scores = (q @ k.transpose(-1, -2)).mul_(within * scale)
        added = (k * out_of).transpose(-1, -2) @ v
        state = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state
        before = []
        for n in range(added.shape[1]):
            before.append(state)
            state = torch.addcmul(added[:, n], across[:, n], state)
        carried = (q * (into * scale)) @ torch.stack(before, dim=1)
        output = torch.baddbmm(carried.flatten(0, 2), scores.flatten(0, 2), v.flatten(0, 2)).view_as(carried)
        output = output.transpose(2, 3).flatten(1, 2)[:, :length]
    return output.to(value.dtype), state if output_final_state else None


def in_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[batch, length, heads, dim] -> [batch, chunks, heads, size, dim], zero past the end."""
    if pad := -x.shape[1] % size:
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
    return x.unflatten(1, (-1, size)).transpose(2, 3).contiguous()


def retention_fading(query, documents, chunk_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """How much is left, chunk by chunk, [batch or 1, chunks, heads, ...]: between two steps of a chunk [c, c], from its
    start into a step [c, 1], from a step to its end [c, 1], and from its start to its end [1, 1]."""
    batch, length, heads = query.shape[:3]
    pad = -length % chunk_size
    log_gamma = retention_decay(heads, query.device, dtype).log()[:, None]
    if documents is None:
        ages = torch.arange(1, chunk_size + 1, device=query.device).expand(1, (length + pad) // chunk_size, 1, -1)
        last = ages[..., -1:].clone()
        last[:, -1] = chunk_size - pad  # the padding at the end fades nothing
        one = ages[:, :1]
        within = ((one[..., :, None] - one[..., None, :]) * log_gamma[..., None]).exp().tril()
        out_of = ((last - ages).clamp(min=0) * log_gamma).exp()[..., None]
        return within, (one * log_gamma).exp()[..., None], out_of, (last * log_gamma).exp()[..., None]
    real, document = document_runs(documents, query)
    age = F.pad(real.long(), (0, pad)).unflatten(1, (-1, chunk_size)).cumsum(-1)[:, :, None]  # in real tokens
    document = F.pad(document, (0, pad), mode="replicate").unflatten(1, (-1, chunk_size))[:, :, None]
    carried = F.pad(document[:, :-1, :, -1:], (0, 0, 0, 0, 1, 0), value=1)  # the document that the state belongs to
    lag = age[..., :, None] - age[..., None, :]
    same = document[..., :, None] == document[..., None, :]
    within = ((lag * log_gamma[..., None]).exp() * same).tril()
    into = ((age * log_gamma).exp() * (document == carried))[..., None]
    out_of = (((age[..., -1:] - age) * log_gamma).exp() * (document == document[..., -1:]))[..., None]
    return within, into, out_of, into[..., -1:, :]
