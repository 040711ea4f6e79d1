"""S4's state space, whose matrix is diagonal plus low rank, by the bilinear rule (Gu et al., 2021, arXiv:2111.00396,
section 2.3 and theorem 3).

    state_t = (1 - step/2 M)^-1 ((1 + step/2 M) state_(t-1) + step B x_t),  M = diagonal - P P^*
    y_t = Re(sum of conj(readout) * state_t) + skip x_t

States are halves of pairs of conjugates: P^* s stands for 2 Re(sum of conj(P) s). Shapes: x [batch, length, channels];
step [channels]; diagonal, P, B [channels, states] complex, the real part of `diagonal` negative; readout [1 or 2,
channels, states] complex, skip, state and documents as in `diagonal_state_space.py`.

The paper makes the convolution kernel of a whole text by its generating function. Here only the powers that a chunk
needs are made, by doubling: linear in the length, with states that go on, and no truncated C to keep.
"""

from typing import NamedTuple

import torch

from .diagonal_state_space import pairs
from .documents import document_steps
from .precision import without_autocast
from .time_invariant import CHUNK, apply_chunks, toeplitz


class LowRank(NamedTuple):
    """One step of the recurrence, by the formula of Woodbury: as many operations as states."""

    half: torch.Tensor  # [channels, 1] step / 2
    diagonal: torch.Tensor  # [channels, states] complex
    P: torch.Tensor
    inverse: torch.Tensor  # of 1 - half * diagonal
    correction: torch.Tensor  # [channels, states] complex: what the low rank changes in the inverse
    added: torch.Tensor  # what an input of 1 adds to a state

    def advance(self, state: torch.Tensor) -> torch.Tensor:
        """[..., channels, states] complex -> the same, a step later without an input."""
        moved = state + self.half * (self.diagonal * state - self.P * both(self.P, state))
        return solve(self.P, self.inverse, self.correction, moved)


def both(P: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """P^* state over pairs of conjugates, [..., 1], real."""
    return 2 * (torch.view_as_real(P) * torch.view_as_real(state)).sum((-1, -2))[..., None]


def solve(P, inverse, correction, state: torch.Tensor) -> torch.Tensor:
    """(1 - half M)^-1 state."""
    solved = inverse * state
    return solved - correction * both(P, solved)


def low_rank(step, diagonal, P, B) -> LowRank:
    half = step[:, None] / 2
    inverse = 1 / (1 - half * diagonal)
    correction = half * inverse * P / (1 + half * both(P, inverse * P))
    return LowRank(half, diagonal, P, inverse, correction, solve(P, inverse, correction, 2 * half * B))


def recurrent_low_rank_state_space(
    x, step, diagonal, P, B, readout, skip, *, documents=None, initial_state=None, output_final_state=False
):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    with without_autocast(x):
        told = {"documents": documents, "initial_state": initial_state, "output_final_state": output_final_state}
        return step_low_rank(x, low_rank(step, diagonal, P, B), readout, skip, **told)


def step_low_rank(x, matrix: LowRank, readout, skip, *, documents=None, initial_state=None, output_final_state=False):
    """`recurrent_low_rank_state_space` by what `low_rank` made before."""
    with without_autocast(x):
        x_ = x.to(skip.dtype)
        shape = x.shape[0], *matrix.diagonal.shape, 2
        state = x_.new_zeros(shape) if initial_state is None else initial_state.to(x_.dtype)
        state = torch.view_as_complex(state.contiguous())
        if documents is not None:
            real, starts = document_steps(documents)
        outputs = []
        for t in range(x.shape[1]):
            kept = state if documents is None else state * ~starts[:, t, None, None]
            after = matrix.advance(kept) + matrix.added * x_[:, t, :, None]
            state = after if documents is None else torch.where(real[:, t, None, None], after, state)
            outputs.append((readout[0].conj() * state).real.sum(-1) + skip * x_[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), torch.view_as_real(state) if output_final_state else None


def chunk_low_rank_state_space(
    x, step, diagonal, P, B, readout, skip, *, documents=None, initial_state=None, output_final_state=False
):
    """The same answer in parallel, and that of two readouts."""
    with without_autocast(x):
        chunks = dense_chunks(low_rank(step, diagonal, P, B), readout, skip)
    told = {"documents": documents, "initial_state": initial_state, "output_final_state": output_final_state}
    return apply_chunks(x, chunks, **told)


class DenseChunks(NamedTuple):
    """As `Chunks` of `time_invariant.py`; matrices work on rows of real and imaginary parts."""

    within: torch.Tensor
    out_of: torch.Tensor
    into: torch.Tensor  # [channels, size, directions * numbers] from a token to the state at the end
    matrix: torch.Tensor  # [channels, numbers, numbers] of one step
    across: torch.Tensor  # of a chunk

    @property
    def numbers(self) -> int:
        return self.matrix.shape[-1]

    def take_in(self, rows):
        return rows @ self.into

    def carry(self, added, keep, state):
        state, before = torch.zeros_like(added[:, 0]) if state is None else state, []
        for n, new in enumerate(added.unbind(1)):
            before.append(state)
            kept = state if keep is None else state * keep[n, :, None]
            state = torch.baddbmm(new, kept, self.across)
        return torch.stack(before, dim=1)

    def advance(self, state, count):
        matrix = self.matrix
        for bit in range(self.within.shape[-1].bit_length()):
            state = torch.where((count >> bit & 1).bool()[:, None], state @ matrix, state)
            matrix = matrix @ matrix
        return state


def dense_chunks(matrix: LowRank, readout: torch.Tensor, skip: torch.Tensor) -> DenseChunks:
    """The matrices of the recurrence for chunks of CHUNK tokens, from what a step does to each number of a state."""
    channels, states = matrix.diagonal.shape
    unit = torch.eye(2 * states, dtype=skip.dtype, device=skip.device)[:, None].expand(-1, channels, -1)
    squares = [numbers_of(matrix.advance(pairs(unit))).transpose(0, 1)]  # of A, as rows of numbers meet it
    for _ in range(CHUNK.bit_length() - 1):
        squares.append(squares[-1] @ squares[-1])
    added, readout = numbers_of(matrix.added)[:, None], [numbers_of(row)[:, None] for row in readout]
    held = times_powers(added, squares)  # [channels, CHUNK, numbers]
    transposed = [square.mT for square in squares]
    read = [times_powers(readout[0] @ transposed[0], transposed)]
    of_itself = (readout[0] * added).sum(-1)
    after = torch.cat((of_itself + skip[:, None], (read[0][:, :-1] * added).sum(-1)), dim=1)
    into, before = [held.flip(1)], None
    if len(readout) > 1:
        into.append(held)
        read.append(times_powers(readout[1], transposed).flip(1))
        before = (read[1][:, 1:] * added).sum(-1).flip(1)
    into, out_of = torch.cat(into, dim=-1), torch.cat(read, dim=-1).mT
    return DenseChunks(toeplitz(after, before), out_of, into, squares[0], squares[-1])


def times_powers(row: torch.Tensor, squares: list[torch.Tensor]) -> torch.Tensor:
    """row, row A, row A^2, ... [channels, CHUNK, numbers] from `row` [channels, 1, numbers] and A, A^2, A^4, ..."""
    for square in squares[:-1]:
        row = torch.cat((row, row @ square), dim=1)
    return row


def numbers_of(state: torch.Tensor) -> torch.Tensor:
    """[..., states] complex -> [..., 2 * states]"""
    return torch.view_as_real(state).flatten(-2)
