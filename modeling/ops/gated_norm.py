"""A gated RMS norm (Dao and Gu, 2024, arXiv:2405.21060, section 7.1), that of Mamba-2:

    y = weight * z / sqrt(mean of z^2 over a group + eps)          z = x silu(gate)

Shapes: x, gate [..., size], weight [size]; a group is size / groups numbers side by side. What is made on the way is in
float32 at least.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .precision import without_autocast


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, groups: int = 1, eps: float = 1e-5
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        return GatedRMSNorm.apply(x.to(wide), gate.to(wide), weight.to(wide), groups, eps).to(x.dtype)


class GatedRMSNorm(torch.autograd.Function):
    """Only its arguments are kept for backward."""

    @staticmethod
    def forward(ctx, x, gate, weight, groups, eps):
        ctx.options = groups, eps
        ctx.save_for_backward(x, gate, weight)
        z, scale = gated(x, gate, groups, eps)
        return z.mul_(scale).view_as(x).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gate, weight = ctx.saved_tensors
        z, scale = gated(x, gate, *ctx.options)
        z, of_normed = z.mul_(scale), (grad * weight).view_as(z)
        of_weight = (grad * z.view_as(grad)).flatten(0, -2).sum(0)
        of_z = torch.addcmul(of_normed, z, (of_normed * z).mean(-1, keepdim=True), value=-1).mul_(scale).view_as(grad)
        return of_z * F.silu(gate), torch.ops.aten.silu_backward(of_z.mul_(x), gate), of_weight, None, None


def gated(x: torch.Tensor, gate: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """z [..., groups, size / groups], and what its norm multiplies it by."""
    z = F.silu(gate).mul_(x).unflatten(-1, (groups, -1))
    squares = torch.linalg.vector_norm(z, dim=-1, keepdim=True).square_()
    return z, squares.div_(z.shape[-1]).add_(eps).rsqrt_()
