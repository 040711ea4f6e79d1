import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in float32 at least, then times a learned weight."""

    def __init__(self, size: int, eps: float = 1e-6, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        length = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=wide)
        scale = torch.rsqrt(length.square() / hidden_states.shape[-1] + self.eps)
        normed = (hidden_states * scale).to(hidden_states.dtype)
        return normed if self.weight is None else normed * self.weight
