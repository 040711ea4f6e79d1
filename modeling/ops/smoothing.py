"""A moving average whose rate each item sets: the smoothing module of H-Net (Hwang et al., 2025, arXiv:2507.07955,
equation 5).

    state_t = (1 - rate_t) * state_(t-1) + rate_t * value_t          out_t = state_t

Shapes: value [batch, length, size]; rate [batch, length], more than 0 and less than 1; state [batch, size], in float32
at least; documents [batch, length] as in `documents.py`: padding adds nothing and fades nothing, the state is forgotten
where a document starts, an initial state belongs to document 1. It is `decayed_attention.py` with one head of one key.
"""

import torch

from .decayed_attention import chunk_decayed_attention, recurrent_decayed_attention


def recurrent_smoothing(value, rate, *, documents=None, initial_state=None, output_final_state=False):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    return by_attention(recurrent_decayed_attention, value, rate, documents, initial_state, output_final_state)


def chunk_smoothing(value, rate, *, documents=None, initial_state=None, output_final_state=False):
    """The same answer in parallel: matrix products inside a chunk, the recurrence between chunks."""
    return by_attention(chunk_decayed_attention, value, rate, documents, initial_state, output_final_state)


def by_attention(attend, value, rate, documents, initial_state, output_final_state):
    one = torch.ones_like(rate)[..., None, None]
    told = {"documents": documents, "output_final_state": output_final_state}
    if initial_state is not None:
        told["initial_state"] = initial_state[:, None, None]
    log_decay = torch.log1p(-rate)[..., None]
    output, state = attend(one, one, value[:, :, None], log_decay, rate[..., None], **told)
    return output.squeeze(2), None if state is None else state[:, 0, 0]
