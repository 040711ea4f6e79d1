import torch
from torch import nn

from ..ops.token_shift import recurrent_token_shift, token_shift
from .cache import RecurrentCacheLayer
from .mixer import carry_on


class TokenShift(nn.Module):
    """The token before each (Peng et al., 2023, arXiv:2305.13048, section 3.1.1), the last one remembered as `name`."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(
        self, x: torch.Tensor, documents: torch.Tensor | None, memory: RecurrentCacheLayer | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x [batch, length, channels] -> the same one token later, and what the memory should write, {} where there is
        none."""
        return carry_on((recurrent_token_shift, token_shift), memory, self.name, (x,), documents=documents)
