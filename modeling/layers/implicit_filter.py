"""The filters of a long convolution as a function of time that a small network is (Poli et al., 2023, arXiv:2302.10866,
section 3.3), which costs as many parameters for a long text as for a short one."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..ops.long_convolution import GROUP, SMALLEST, KernelTransform, transform_kernel
from ..ops.precision import without_autocast
from .derived import Derived

FASTEST, SLOWEST, FADED = 0.3, 1.5, 1e-2  # times, of the longest text, by which channels fade to a hundredth


class WideLinear(nn.Linear):
    """A Linear in the type of its input, whatever that of its weights: in bfloat16, time would go by in 256 steps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LongFilter(NamedTuple):
    """A kernel [channels, taps], and its transform where it is kept."""

    kernel: torch.Tensor
    transform: KernelTransform | None


class ImplicitFilter(Derived):
    """filter_t = (exp(-delta t) + shift) * tap(sin(f * second(sin(f * first(sin(f * embed(time features)))))), and a
    bias for the token itself, for each channel; `longest` tokens are the unit of time."""

    def __init__(self, channels: int, count: int, longest: int, sizes: tuple[int, int], frequency: float, shift: float):
        """`count` filters of `channels` each; `sizes` of the time features and of the network inside."""
        super().__init__()
        features, width = sizes
        self.count, self.longest, self.features = count, longest, features
        self.first_frequency, self.shift = frequency, shift
        self.embed_proj = WideLinear(features, width)
        self.first_proj = WideLinear(width, width)
        self.second_proj = WideLinear(width, width)
        self.tap_proj = WideLinear(width, count * channels, bias=False)
        self.frequency = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(count * channels))

    def init_parameters(self, std: float) -> None:
        init.constant_(self.frequency, self.first_frequency)
        init.normal_(self.bias)

    def forward(self, tokens: int, going_on: bool = False) -> list[LongFilter]:
        """The filters for texts of up to `tokens`. A compiled step that is `going_on` with a text takes the ones that
        the text was begun with: it cannot ask whether they are still those of the parameters."""
        _, kept, _ = self.made.get("filters", (None, None, None))
        enough = kept is not None and kept[0].kernel.shape[1] >= tokens
        if self.keeps_nothing():
            if going_on and enough and torch.compiler.is_compiling():
                return kept
            return [LongFilter(kernel, None) for kernel in self.kernels(tokens)]
        if not enough:
            self.made.clear()
        return self.derive("filters", lambda: self.prepared(tokens))

    def prepared(self, tokens: int) -> list[LongFilter]:
        """Filters with their transforms, for a few more tokens than asked for: texts grow."""
        size = SMALLEST
        while size < tokens:
            size *= GROUP
        size = min(size, self.longest)
        return [LongFilter(kernel, transform_kernel(kernel, size)) for kernel in self.kernels(size)]

    def kernels(self, taps: int) -> list[torch.Tensor]:
        """`count` kernels [channels, taps], in float32 at least."""
        wide = torch.promote_types(self.bias.dtype, torch.float32)
        with without_autocast(self.bias):
            time, hidden = self.time_features(taps, wide)
            frequency = self.frequency.to(wide)
            for projection in (self.embed_proj, self.first_proj, self.second_proj):
                hidden = torch.sin(frequency * projection(hidden))
            kernel = self.tap_proj(hidden) * (self.decay(time) + self.shift)
            kernel = torch.cat((kernel[:1] + self.bias.to(wide), kernel[1:])).T.contiguous()
        return list(kernel.unflatten(0, (self.count, -1)))

    def time_features(self, taps: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """[taps] time, and [taps, features]: time, and cosines and sines of it."""
        options = {"dtype": dtype, "device": self.bias.device}
        time = torch.linspace(0, 1, self.longest, **options)[:taps]
        bands = (self.features - 1) // 2
        turns = torch.linspace(1e-4, bands - 1, bands, **options)
        angle = turns * (2 * math.pi * torch.arange(taps, **options)[:, None] / self.longest)
        return time, torch.cat((time[:, None], angle.cos(), -angle.sin()), dim=-1)

    def decay(self, time: torch.Tensor) -> torch.Tensor:
        """[taps, channels] from 1 on, at rates that are even between those of the slowest and the fastest channel."""
        slowest, fastest = (-math.log(FADED) / at for at in (SLOWEST, FASTEST))
        rates = torch.linspace(slowest, fastest, len(self.bias), dtype=time.dtype, device=time.device)
        return torch.exp(-rates * time[:, None])
