import torch
from torch import nn
from transformers import initialization as init

from ..ops.gated_recurrence import recurrent_gru, reversal
from .mixer import Mixer


class BidirectionalGRU(Mixer):
    """[h_t from the left, h_t from the right], each of half the width (`ops/gated_recurrence.py`).

    It reads left-aligned texts; `documents` [texts, length] (bool, or None) says which places are of them.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        dim = config.hidden_size // 2
        self.in_proj = nn.Linear(config.hidden_size, 6 * dim)
        self.state_weight = nn.Parameter(torch.empty(2, 3 * dim, dim))
        self.state_bias = nn.Parameter(torch.empty(2, 3 * dim))

    def init_parameters(self, std):
        init.normal_(self.state_weight, std=std)
        init.zeros_(self.state_bias)

    def forward(self, hidden_states, documents=None, **kwargs):
        left, right = self.in_proj(hidden_states).chunk(2, dim=-1)
        turned = None if documents is None else reversal(documents)
        gates = torch.stack((left, backwards(right, turned)))
        left, right = recurrent_gru(gates, self.state_weight, self.state_bias[:, None])
        return torch.cat((left, backwards(right, turned)), dim=-1)


def backwards(x: torch.Tensor, turned: torch.Tensor | None) -> torch.Tensor:
    """Texts [texts, length, ...] in the order `turned`; None where all are as long as their rows."""
    if turned is None:
        return x.flip(1)
    return x.flatten(0, 1).index_select(0, turned.flatten()).view_as(x)
