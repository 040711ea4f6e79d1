"""Retention (Sun et al., 2023, arXiv:2307.08621, equations 5-7): linear attention whose memory fades by a fixed factor
per step and head.

    state_t = gamma * state_(t-1) + key_t^T value_t          out_t = query_t state_t / sqrt(key_dim)

Shapes: query, key [batch, length, heads, key_dim]; value [batch, length, heads, value_dim];
state [batch, heads, key_dim, value_dim], in float32 at least; documents [batch, length] as in `documents.py`: padding
adds nothing and fades nothing, the state is forgotten where a document starts, an initial state belongs to document 1.
The factors are the official code's, gamma = 1 - 2^(-5-head).
"""

import torch

from .dispatch import accelerated
from .documents import document_steps
from .fading import Fading, carry, fading, in_chunks
from .precision import without_autocast


def retention_decay(num_heads: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The gamma of each head, exact in float32 for up to 19 heads."""
    return 1 - torch.exp2(torch.arange(-5, -5 - num_heads, -1, device=device, dtype=dtype))


def recurrent_retention(query, key, value, *, documents=None, initial_state=None, output_final_state=False):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    batch, length, heads, key_dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        q, k, v = query.to(wide) * key_dim**-0.5, key.to(wide), value.to(wide)
        gamma = retention_decay(heads, query.device, wide)[:, None, None]
        state = initial_state
        if state is None:
            state = q.new_zeros(batch, heads, key_dim, v.shape[-1])
        if documents is not None:
            real, starts = document_steps(documents)
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
    with without_autocast(query):
        within, into, out_of, across = retention_fading(query, documents, min(chunk_size, length), wide)
        if documents is not None:
            key = key * (documents > 0)[..., None, None]
        q, k, v = (in_chunks(x.to(wide), within.shape[-1]) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5
        scores = (q @ k.transpose(-1, -2)).mul_(within * scale)
        before, state = carry((k * out_of).transpose(-1, -2) @ v, across, initial_state)
        carried = (q * (into * scale)) @ before
        output = torch.baddbmm(carried.flatten(0, 2), scores.flatten(0, 2), v.flatten(0, 2)).view_as(carried)
        output = output.transpose(2, 3).flatten(1, 2)[:, :length]
    return output.to(value.dtype), state if output_final_state else None


def retention_fading(query, documents, chunk_size: int, dtype: torch.dtype) -> Fading:
    """Where nothing interrupts a row, all its chunks but the last fade alike, and so do all rows."""
    length, heads = query.shape[1:3]
    log_gamma = retention_decay(heads, query.device, dtype).log()
    if documents is not None:
        return fading(log_gamma.expand(*documents.shape, heads), documents, chunk_size)
    pad = -length % chunk_size
    ages = torch.arange(1, chunk_size + 1, device=query.device).expand(1, (length + pad) // chunk_size, 1, -1)
    last = ages[..., -1:].clone()
    last[:, -1] = chunk_size - pad  # the padding at the end fades nothing
    log_gamma, one = log_gamma[:, None], ages[:, :1]
    within = ((one[..., :, None] - one[..., None, :]) * log_gamma[..., None]).exp().tril()
    out_of = ((last - ages).clamp(min=0) * log_gamma).exp()[..., None]
    return Fading(within, (one * log_gamma).exp()[..., None], out_of, (last * log_gamma).exp()[..., None])
