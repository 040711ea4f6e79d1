"""State spaces as parts of mixers: their parameters, and how a continuous one becomes one of steps.

    state' = A state + B x          y = 2 Re(C state) + D x          for each channel by itself

A state stands for a pair of conjugates. `state_parameters` names what wants a small learning rate and no weight decay.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from ..ops.diagonal_state_space import diagonal_chunks, recurrent_diagonal_state_space
from ..ops.low_rank_state_space import dense_chunks, low_rank, step_low_rank
from ..ops.time_invariant import apply_chunks
from .cache import RecurrentCacheLayer
from .derived import Derived
from .hippo import DIAGONALS, low_rank_legs
from .mixer import carry_on


def zero_order_hold(step: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step leaves of a state, and what it makes of B, where x is held from one step to the next."""
    decay = (step * A).exp()
    return decay, (decay - 1) / A


def bilinear(step: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the trapezoidal rule."""
    inverse = 1 / (1 - step / 2 * A)
    return (1 + step / 2 * A) * inverse, step * inverse


DISCRETIZATIONS = {"zoh": zero_order_hold, "bilinear": bilinear}


class DiagonalStateSpace(Derived):
    """S4D (Gu et al., 2022, arXiv:2206.11893): a diagonal A. Where `directions` is 2, a second C reads a state that
    comes from the end of the text."""

    state_parameters = ("log_step", "A_log", "A_imag", "B")

    def __init__(self, config, channels: int, directions: int = 1, name: str = "state"):
        super().__init__()
        states = config.state_size // 2
        self.name, self.steps = name, (config.time_step_min, config.time_step_max)
        self.initial = DIAGONALS[config.initialization]
        self.discretize = DISCRETIZATIONS[config.discretization]
        self.log_step = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.empty(channels, states))
        self.A_imag = nn.Parameter(torch.empty(channels, states))
        self.B = nn.Parameter(torch.empty(channels, states, 2))
        self.C = nn.Parameter(torch.empty(directions, channels, states, 2))
        self.D = nn.Parameter(torch.empty(channels))

    def init_parameters(self, std: float) -> None:
        self.begin(*self.initial(self.A_log.shape[1]))

    def begin(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """A and B [states] for all channels; step sizes even in their logarithm; C and D by chance."""
        low, high = self.steps
        init.copy_(self.log_step, torch.rand(len(self.log_step)) * math.log(high / low) + math.log(low))
        init.copy_(self.A_log, (-A.real).log().expand_as(self.A_log))
        init.copy_(self.A_imag, A.imag.expand_as(self.A_imag))
        init.copy_(self.B, torch.view_as_real(B + 0j).expand_as(self.B))
        init.normal_(self.C, std=math.sqrt(0.5))
        init.normal_(self.D)

    def forward(
        self, x: torch.Tensor, documents: torch.Tensor | None, memory: RecurrentCacheLayer | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x [batch, length, channels] -> the same, and what the memory should write, {} where there is none."""
        tensors = (x, *self.derive("matrices", self.matrices))
        return carry_on((self.step, self.in_chunks), memory, self.name, tensors, documents=documents)

    def in_chunks(self, x: torch.Tensor, *matrices, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
        return apply_chunks(x, self.derive("chunks", lambda: self.chunks(*matrices)), **options)

    step = staticmethod(recurrent_diagonal_state_space)
    chunks = staticmethod(diagonal_chunks)

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """(decay, readout, skip), as the op takes them."""
        step, A, B, C, skip = self.continuous()
        decay, gain = self.discretize(step[:, None], A)
        return decay, (2 * C * (B * gain)).conj().resolve_conj(), skip

    def continuous(self) -> tuple[torch.Tensor, ...]:
        """step [channels], A, B [channels, states] and C [directions, channels, states] complex, D, all wide."""
        wide = torch.promote_types(self.D.dtype, torch.float32)
        A = torch.complex(-self.A_log.to(wide).exp(), self.A_imag.to(wide))
        B, C = (torch.view_as_complex(parameter.to(wide)) for parameter in (self.B, self.C))
        return self.log_step.to(wide).exp(), A, B, C, self.D.to(wide)


class LowRankStateSpace(DiagonalStateSpace):
    """S4 (Gu et al., 2021, arXiv:2111.00396): A is a diagonal less P P^*; it begins as HiPPO-LegS. By the bilinear
    rule."""

    state_parameters = (*DiagonalStateSpace.state_parameters, "P")

    def __init__(self, config, channels: int, directions: int = 1, name: str = "state"):
        super().__init__(config, channels, directions, name)
        self.P = nn.Parameter(torch.empty_like(self.B))

    def init_parameters(self, std: float) -> None:
        A, P, B = low_rank_legs(2 * self.A_log.shape[1])
        self.begin(A, B)
        init.copy_(self.P, torch.view_as_real(P).expand_as(self.P))

    step = staticmethod(step_low_rank)
    chunks = staticmethod(dense_chunks)

    def matrices(self):
        """(the step of the matrix, readout, skip)."""
        step, A, B, C, skip = self.continuous()
        P = torch.view_as_complex(self.P.to(skip.dtype))
        return low_rank(step, A, P, B), (2 * C).conj().resolve_conj(), skip
