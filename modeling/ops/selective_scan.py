"""The selective state space of Mamba (Gu and Dao, 2023, arXiv:2312.00752, equation 2 and algorithm 2): every channel
has states of its own, whose decays and inputs each token sets.

    state_t = exp(step_t A) * state_(t-1) + key_t (step_t x_t)          out_t = query_t state_t

Shapes: x, step [batch, length, channels], step 0 or more; A [states, channels], negative; key and query, B and C of the
paper, [batch, length, states]; state [batch, states, channels], in float32 at least; documents [batch, length] as in
`documents.py`: padding adds nothing and fades nothing, the state is forgotten where a document starts, an initial state
belongs to document 1.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .documents import document_runs
from .fading import carry

BLOCK = 128  # tokens whose states exist at once: channels * states numbers for each
STRIDE = 16  # steps that are made one after another, those of a block side by side


def recurrent_selective_scan(x, step, A, key, query, *, documents=None, initial_state=None, output_final_state=False):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    x_, step, A, key, query, keep, state = prepared(x, step, A, key, query, documents, initial_state)
    outputs = []
    with torch.autocast(x.device.type, enabled=False):
        for t in range(x_.shape[1]):
            decay = left(step[:, t], A, None if keep is None else keep[:, t])
            state = torch.addcmul(decay * state, key[:, t, :, None], (step * x_)[:, t, None, :])
            outputs.append((query[:, t, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1).to(x.dtype), state if output_final_state else None


def chunk_selective_scan(x, step, A, key, query, *, documents=None, initial_state=None, output_final_state=False):
    """The same answer a block at a time, steps of a block side by side; states are made again in backward, so that
    there are never more than those of a block."""
    x_, step, A, key, query, keep, state = prepared(x, step, A, key, query, documents, initial_state)
    outputs, again = [], torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False):
        tensors = (step * x_, step, key, query) if keep is None else (step * x_, step, key, query, keep)
        for piece in zip(*(tensor.split(BLOCK, dim=1) for tensor in tensors), strict=True):
            if again:
                output, state = checkpoint(scan_block, A, state, *piece, use_reentrant=False)
            else:
                output, state = scan_block(A, state, *piece)
            outputs.append(output)
    return torch.cat(outputs, dim=1).to(x.dtype), state if output_final_state else None


def prepared(x, step, A, key, query, documents, state) -> tuple[torch.Tensor, ...]:
    """Everything wide; steps of 0 at padding; and whether the state goes on at each token
    [batch, length, 1], None where it always does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, step, A, key, query = (tensor.to(wide) for tensor in (x, step, A, key, query))
    keep = None
    if documents is not None:
        real, document = document_runs(documents, x)
        step = step * real[..., None]
        keep = (document.diff(dim=1, prepend=torch.ones_like(document[:, :1])) == 0)[..., None].to(wide)
    if state is None:
        state = x.new_zeros(len(x), *A.shape)
    return x, step, A, key, query, keep, state


def left(step: torch.Tensor, A: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """[..., states, channels] of what is left of a state after `step` [..., channels]."""
    decay = torch.exp(step[..., None, :] * A)
    return decay if keep is None else decay * keep[..., None]


def scan_block(A, state, added, step, key, query, keep=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [batch, length, channels], the state at the end) of a few tokens. The block is cut into rows of STRIDE
    steps: first what each row adds up by itself, then the states at the starts of rows, then all steps again from
    there."""
    length, size = added.shape[1], min(STRIDE, added.shape[1])
    pad = -length % size
    if pad:  # steps of 0 that go on
        added, step, key, query = (F.pad(tensor, (0, 0, 0, pad)) for tensor in (added, step, key, query))
        keep = None if keep is None else F.pad(keep, (0, 0, 0, pad), value=1.0)
    added, step, key, query = (tensor.unflatten(1, (-1, size)) for tensor in (added, step, key, query))
    keep = None if keep is None else keep.unflatten(1, (-1, size))
    across = left(step.sum(2), A, None if keep is None else keep.prod(2))  # [batch, rows, states, channels]
    goes_on = (None,) * size if keep is None else keep.unbind(2)
    decays = [left(of_step, A, on) for of_step, on in zip(step.unbind(2), goes_on, strict=True)]
    inputs = [k[..., None] * x[..., None, :] for k, x in zip(key.unbind(2), added.unbind(2), strict=True)]
    states = inputs[0]
    for n in range(1, size):
        states = torch.addcmul(inputs[n], decays[n], states)
    states, state = carry(states, across, state)
    outputs = []
    for n in range(size):
        states = torch.addcmul(inputs[n], decays[n], states)
        outputs.append((query[:, :, n, None, :] @ states).squeeze(-2))
    return torch.stack(outputs, dim=2).flatten(1, 2)[:, :length], state
