"""How tokens that fall out of a memory are compressed (Rae et al., 2019, arXiv:1911.05507, section 3.2)."""

import torch
from torch import nn


class Compression(nn.Module):
    """A few numbers for many: units of tokens -> fewer slots of the same size, `rate` tokens to a slot.

    A unit is what is compressed without a look at others: here, the tokens of one slot. `usage` is the attention that
    tokens got, in any shape; None where `by_use` is False.
    """

    by_use = False  # whether it asks how much attention the tokens got

    def __init__(self, config):
        super().__init__()
        self.rate, self.unit = config.compression_rate, config.compression_rate

    def forward(self, units: torch.Tensor, usage: torch.Tensor | None = None) -> torch.Tensor:
        """units [..., unit, size] -> [..., unit / rate, size]."""
        raise NotImplementedError


class MeanPooling(Compression):
    def forward(self, units, usage=None):
        return units.mean(-2, keepdim=True)


class MaxPooling(Compression):
    def forward(self, units, usage=None):
        return units.amax(-2, keepdim=True)


class Convolution(Compression):
    """A convolution whose kernel is as long as its stride, the rate: one matrix product."""

    def __init__(self, config):
        super().__init__(config)
        self.kernel = nn.Linear(self.rate * config.hidden_size, config.hidden_size)

    def forward(self, units, usage=None):
        return self.kernel(units.flatten(-2))[..., None, :]


class DilatedConvolution(Compression):
    """Convolutions of two taps with dilations 1, 2, 4, ..., a relu between them, up to the rate, of which the last
    token of each unit tells. Each makes one of two neighbours then: what else they would make is not used."""

    def __init__(self, config):
        super().__init__(config)
        layers = self.rate.bit_length() - 1
        self.kernels = nn.ModuleList(nn.Linear(2 * config.hidden_size, config.hidden_size) for _ in range(layers))

    def forward(self, units, usage=None):
        first, *rest = self.kernels
        units = first(units.unflatten(-2, (-1, 2)).flatten(-2))
        for kernel in rest:
            units = kernel(units.relu().unflatten(-2, (-1, 2)).flatten(-2))
        return units


class MostUsed(Compression):
    """The tokens that got the most attention, in their order: of those that leave at the end of a segment, one of
    `rate`."""

    by_use = True

    def __init__(self, config):
        super().__init__(config)
        self.unit = config.segment_length

    def forward(self, units, usage=None):
        usage = usage.reshape(units.shape[:-1])
        chosen = usage.topk(self.unit // self.rate, dim=-1).indices.sort(-1).values
        return units.gather(-2, chosen[..., None].expand(*chosen.shape, units.shape[-1]))


COMPRESSIONS: dict[str, type[Compression]] = {
    "mean_pooling": MeanPooling,
    "max_pooling": MaxPooling,
    "convolution": Convolution,
    "dilated_convolution": DilatedConvolution,
    "most_used": MostUsed,
}
