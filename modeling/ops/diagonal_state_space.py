"""A state space whose matrix is diagonal and the same at every step (Gu et al., 2022, arXiv:2206.11893, equations 2-5).

    state_t = decay * state_(t-1) + x_t          y_t = Re(sum of conj(readout) * state_t) + skip x_t

Shapes: x [batch, length, channels]; decay [channels, states] complex, no longer than 1; readout [1, channels, states]
complex: the conjugate of C times the discrete B of the paper, and twice that where a state stands for a pair; skip
[channels];
state [batch, channels, states, 2], real and imaginary parts in float32 at least; documents [batch, length] as in
`documents.py`: padding adds nothing and fades nothing, the state is forgotten where a document starts, an initial state
belongs to document 1.

A second readout [2, channels, states] is of the same recurrence from the end of a document: what comes after a token.
"""

from typing import NamedTuple

import torch

from .documents import document_steps
from .fading import carry
from .precision import without_autocast
from .time_invariant import CHUNK, apply_chunks, toeplitz


def recurrent_diagonal_state_space(
    x, decay, readout, skip, *, documents=None, initial_state=None, output_final_state=False
):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    wide = skip.dtype
    with without_autocast(x):
        x_ = x.to(wide)
        state = x_.new_zeros(x.shape[0], *decay.shape, 2) if initial_state is None else initial_state.to(wide)
        state = torch.view_as_complex(state.contiguous())
        if documents is not None:
            real, starts = document_steps(documents)
        outputs = []
        for t in range(x.shape[1]):
            kept = state if documents is None else state * ~starts[:, t, None, None]
            after = decay * kept + x_[:, t, :, None]
            state = after if documents is None else torch.where(real[:, t, None, None], after, state)
            outputs.append((readout[0].conj() * state).real.sum(-1) + skip * x_[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), torch.view_as_real(state) if output_final_state else None


def chunk_diagonal_state_space(
    x, decay, readout, skip, *, documents=None, initial_state=None, output_final_state=False, chunk_size=CHUNK
):
    """The same answer in parallel, and that of two readouts."""
    with without_autocast(x):
        chunks = diagonal_chunks(decay, readout, skip, chunk_size)
    told = {"documents": documents, "initial_state": initial_state, "output_final_state": output_final_state}
    return apply_chunks(x, chunks, **told)


class DiagonalChunks(NamedTuple):
    """As `Chunks` of `time_invariant.py`."""

    within: torch.Tensor
    out_of: torch.Tensor
    into: torch.Tensor  # [channels, size, directions * numbers] from a token to the state at the end
    decay: torch.Tensor  # [channels, states] complex: of one step
    across: torch.Tensor  # of a chunk

    @property
    def numbers(self) -> int:
        return 2 * self.decay.shape[-1]

    def take_in(self, rows):
        return rows @ self.into

    def carry(self, added, keep, state):
        across = self.across[:, None, None].expand(-1, added.shape[1], -1, -1)
        if keep is not None:
            across = across * keep[..., None]
        state = None if state is None else pairs(state)
        before, _ = carry(pairs(added), across, state)
        return torch.view_as_real(before).flatten(-2)

    def advance(self, state, count):
        state, decay = pairs(state), self.decay[:, None]
        for bit in range(self.within.shape[-1].bit_length()):
            state = torch.where((count >> bit & 1).bool()[:, None], decay * state, state)
            decay = decay * decay
        return torch.view_as_real(state).flatten(-2)


def pairs(numbers: torch.Tensor) -> torch.Tensor:
    """[..., 2 * states] -> [..., states] complex."""
    return torch.view_as_complex(numbers.unflatten(-1, (-1, 2)).contiguous())


def diagonal_chunks(
    decay: torch.Tensor, readout: torch.Tensor, skip: torch.Tensor, size: int = CHUNK
) -> DiagonalChunks:
    """The matrices of the recurrence for chunks of `size` tokens. A power is a product of two of a few: there are no
    exponentials, and one pass over each matrix."""
    some = 1 << (size.bit_length() // 2)
    fine = powers(decay, some + 1)
    coarse = powers(fine[:, -1], -(-size // some))
    across = coarse[:, (size - 1) // some] * fine[:, (size - 1) % some + 1]
    fine, step = fine[:, :-1], decay.conj().resolve_conj()
    back = fine.conj().resolve_conj(), coarse.conj().resolve_conj()
    into = [product(coarse.flip(1), fine.flip(1))[:, -size:]]
    out_of = [product(back[1] * (readout[0] * step)[:, None], back[0])[:, :size]]
    after = torch.cat((readout[0].real.sum(-1, keepdim=True), out_of[0][:, :-1, ::2].sum(-1)), dim=1)
    after = torch.cat((after[:, :1] + skip[:, None], after[:, 1:]), dim=1)
    before = None
    if len(readout) > 1:
        into.append(product(coarse, fine)[:, :size])
        out_of.append(product((back[1] * readout[1][:, None]).flip(1), back[0].flip(1))[:, -size:])
        before = out_of[1][:, 1:, ::2].sum(-1).flip(1)
    into, out_of = torch.cat(into, dim=-1), torch.cat(out_of, dim=-1).transpose(1, 2)
    return DiagonalChunks(toeplitz(after, before), out_of, into, decay, across)


def product(coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """[channels, a, states] and [channels, b, states] complex -> [channels, a * b, 2 * states]"""
    return torch.view_as_real((coarse[:, :, None] * fine[:, None]).flatten(1, 2)).flatten(-2)


def powers(base: torch.Tensor, count: int) -> torch.Tensor:
    """base^0 ... base^(count - 1) [channels, count, states]"""
    found = torch.stack((torch.ones_like(base), base), dim=1)
    while found.shape[1] < count:
        found = torch.cat((found, found * (found[:, -1] * base)[:, None]), dim=1)
    return found[:, :count]
