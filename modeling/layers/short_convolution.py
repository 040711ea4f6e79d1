import math

import torch
from torch import nn
from transformers import initialization as init

from ..ops.convolution import causal_convolution, chunk_convolution, recurrent_convolution
from .cache import RecurrentCacheLayer
from .mixer import carry_on

MANY = 16  # taps from which on matrix products are faster


class ShortConvolution(nn.Module):
    """A causal convolution of each channel by itself, which remembers the last tokens as `name`."""

    def __init__(self, channels: int, size: int, bias: bool = True, name: str = "convolution"):
        super().__init__()
        self.name = name
        self.forms = recurrent_convolution, chunk_convolution if size >= MANY else causal_convolution
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_parameters(self, std: float) -> None:
        """As torch begins a Conv1d."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: torch.Tensor, documents: torch.Tensor | None, memory: RecurrentCacheLayer | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x [batch, length, channels] -> the same, and what the memory should write, {} where there is none."""
        return carry_on(self.forms, memory, self.name, (x, self.weight, self.bias), documents=documents)
