"""Linear attention whose memory fades by a factor that each token sets for each head: the state-space duality of
Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060, section 6), gated linear attention with scalar gates.

    state_t = exp(log_decay_t) * state_(t-1) + key_t^T value_t          out_t = query_t state_t

Shapes: query, key [batch, length, groups, key_dim], each shared by the heads of a group; value [batch, length, heads,
value_dim]; log_decay [batch, length, heads], 0 or less; state [batch, heads, key_dim, value_dim], in float32 at least;
documents [batch, length] as in `documents.py`: padding adds nothing and fades nothing, the state is forgotten where a
document starts, an initial state belongs to document 1.
"""

import torch
import torch.nn.functional as F

from .dispatch import accelerated
from .documents import document_runs
from .fading import carry, fading, in_chunks


def recurrent_decayed_attention(
    query, key, value, log_decay, *, documents=None, initial_state=None, output_final_state=False
):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    of_group = query.shape[2], value.shape[2] // query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v, decay = (x.to(wide) for x in (query, key, value, log_decay))
        v, decay, state = v.unflatten(2, of_group), decay.exp().unflatten(2, of_group), initial_state
        if state is None:
            state = v.new_zeros(len(v), value.shape[2], k.shape[-1], v.shape[-1])
        state = state.unflatten(1, of_group)
        if documents is not None:
            real, document = document_runs(documents, query)
            starts = document.diff(dim=1, prepend=torch.ones_like(document[:, :1])) != 0
        outputs = []
        for t in range(q.shape[1]):
            kept = decay[:, t, ..., None, None] * state
            if documents is not None:
                kept = kept * ~starts[:, t, None, None, None, None]
            after = torch.addcmul(kept, k[:, t, :, None, :, None], v[:, t, ..., None, :])
            state = after if documents is None else torch.where(real[:, t, None, None, None, None], after, state)
            outputs.append(q[:, t, :, None, None] @ state)
        output = torch.stack(outputs, dim=1).flatten(2, 3).squeeze(-2)
    return output.to(value.dtype), state.flatten(1, 2) if output_final_state else None


def fla_decayed_attention(simple_gla, query, key, value, log_decay, **options):
    """flash-linear-attention's kernel has a key for each head, one type for all three, and a scale of its own."""
    query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], dim=2) for x in (query, key))
    output, state = simple_gla(query, key, value.to(query.dtype), log_decay, scale=1.0, **options)
    return output.to(value.dtype), state


@accelerated("fla.ops.simple_gla:chunk_simple_gla", adapt=fla_decayed_attention)
def chunk_decayed_attention(
    query, key, value, log_decay, *, documents=None, initial_state=None, output_final_state=False, chunk_size=64
):
    """The same answer in parallel: attention inside a chunk, the recurrence between chunks. Scores of queries and keys
    are made once for a group."""
    (length, groups), (heads, dim) = query.shape[1:3], value.shape[2:]
    wide, size = torch.promote_types(query.dtype, torch.float32), min(chunk_size, length)
    with torch.autocast(query.device.type, enabled=False):
        within, into, out_of, across = fading(log_decay.to(wide), documents, size)
        if documents is not None:
            value = value * (documents > 0)[..., None, None]
        of_group, pad = (groups, heads // groups), -length % size
        q, k = (in_chunks(x.to(wide), size) for x in (query, key))
        v = F.pad(value.to(wide), (0, 0, 0, 0, 0, pad)) if pad else value.to(wide)
        v = v.unflatten(1, (-1, size))  # [batch, chunks, size, heads, dim], as it lies; what it is scaled by follows it
        into, out_of = into.transpose(2, 3), out_of.transpose(2, 3)
        # What the heads of a group take in by the same keys lies side by side: [key_dim, size] @ [size, heads * dim]
        beside = (v * out_of).unflatten(3, of_group).flatten(-2).transpose(2, 3)
        added = (k.transpose(-1, -2) @ beside).unflatten(-1, (-1, dim))
        state = None if initial_state is None else initial_state.unflatten(1, of_group).transpose(2, 3)
        before, state = carry(added, across.unflatten(2, of_group).transpose(3, 4), state)
        carried = (q @ before.flatten(-2)).transpose(2, 3).reshape(v.shape) * into
        scores = ((q @ k.transpose(-1, -2))[:, :, :, None] * within.unflatten(2, of_group)).flatten(2, 3)
        output = carried + (scores @ v.transpose(2, 3)).transpose(2, 3)
        output = output.flatten(1, 2)[:, :length]
        state = state.transpose(2, 3).flatten(1, 2) if output_final_state else None
    return output.to(value.dtype), state
