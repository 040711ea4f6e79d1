"""The token before each, of the real ones of its document: the first has zeros before it.

Shapes: x [batch, length, channels]; state [batch, 1, channels], the last real token, in the type of x; documents
[batch, length] as in `documents.py`.
"""

import torch
import torch.nn.functional as F

from .documents import document_runs, document_steps


def recurrent_token_shift(x, *, documents=None, initial_state=None, output_final_state=False):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    state = torch.zeros_like(x[:, :1]) if initial_state is None else initial_state.to(x.dtype)
    if documents is not None:
        real, starts = document_steps(documents)
    outputs = []
    for t, token in enumerate(x.split(1, dim=1)):
        outputs.append(state if documents is None else state * ~starts[:, t, None, None])
        state = token if documents is None else torch.where(real[:, t, None, None], token, outputs[-1])
    # A copy, also of one: a cache at fixed addresses writes over the state
    return torch.cat(outputs, dim=1), state if output_final_state else None


def token_shift(x, *, documents=None, initial_state=None, output_final_state=False):
    """The same answer in parallel."""
    state = torch.zeros_like(x[:, :1]) if initial_state is None else initial_state.to(x.dtype)
    x = torch.cat((state, x), dim=1)
    if documents is None:
        return x[:, :-1], x[:, -1:].clone() if output_final_state else None
    real, document = document_runs(F.pad(documents, (1, 0), value=1), x)
    column = torch.arange(x.shape[1], device=x.device)
    latest = torch.where(real, column, 0).cummax(dim=1).values  # the column of the last real token so far
    same = document[:, 1:] == document.gather(1, latest[:, :-1])
    before = x.gather(1, latest[:, :-1, None].expand(-1, -1, x.shape[-1])) * same[..., None]
    return before, x.gather(1, latest[:, -1:, None].expand(-1, -1, x.shape[-1])) if output_final_state else None
