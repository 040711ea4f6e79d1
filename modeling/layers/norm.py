import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.RMSNorm):
    """weight * x / sqrt(mean of x^2 + eps). On a CPU torch writes x^2 and what it is divided by to memory; where no
    gradient is asked for, neither is, and a step in decoding takes half the time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        here = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.dtype == self.weight.dtype
        if not here or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * length.square_().mul_(1 / x.shape[-1]).add_(self.eps).rsqrt_()).mul_(self.weight)


class WideRMSNorm(RMSNorm):
    """The same of what is wider than the weight, computed as wide as that; the answer is of the type of the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
