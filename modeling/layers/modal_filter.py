"""The filters of a long convolution as sums of fading waves: what implicit ones are distilled to (Massaroli et al.,
2023, arXiv:2310.18780), a small recurrence in their place."""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init


class Modes(NamedTuple):
    """As `diagonal_state_space` takes them."""

    decay: torch.Tensor  # [channels, states] complex
    readout: torch.Tensor  # [1, channels, states] complex
    skip: torch.Tensor  # [channels]


class ModalFilter(nn.Module):
    """filter_t = Re sum_n conj(readout_n) exp((i turn_n - rate_n) t), and a skip for the token itself, for each
    channel. A rate is kept as its logarithm, so that no wave grows."""

    def __init__(self, channels: int, count: int, states: int, longest: int):
        """`count` filters of `channels` each; at first they fade over `longest` tokens, or a hundredth of it."""
        super().__init__()
        self.count, self.longest = count, longest
        self.rate_log = nn.Parameter(torch.empty(count * channels, states))
        self.turn = nn.Parameter(torch.empty(count * channels, states))
        self.readout = nn.Parameter(torch.empty(count * channels, states, 2))
        self.skip = nn.Parameter(torch.empty(count * channels))

    def init_parameters(self, std: float) -> None:
        states = self.turn.shape[1]
        init.uniform_(self.rate_log, -math.log(self.longest), math.log(100 / self.longest))
        init.copy_(self.turn, (2 * math.pi / self.longest * torch.arange(states)).expand_as(self.turn))
        init.normal_(self.readout, std=states**-0.5)
        init.normal_(self.skip)

    def forward(self) -> list[Modes]:
        wide = torch.promote_types(self.skip.dtype, torch.float32)
        rate, turn, readout, skip = (x.to(wide) for x in (self.rate_log, self.turn, self.readout, self.skip))
        decay = torch.polar(torch.exp(-rate.exp()), turn)
        parts = (x.unflatten(0, (self.count, -1)) for x in (decay, torch.view_as_complex(readout), skip))
        return [Modes(decay, readout[None], skip) for decay, readout, skip in zip(*parts, strict=True)]
