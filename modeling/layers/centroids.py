"""Online k-means: the centroids of a layer's clusters follow the tokens that training shows them."""

import torch
import torch.nn.functional as F
from transformers import initialization as init

from ..ops.precision import without_autocast
from .training_buffer import TrainingBuffer


class Centroids(TrainingBuffer):
    """A direction for each cluster of each head, mu <- decay mu + (1 - decay) unit(sum of the nearest tokens), once per
    optimizer step (Roy et al., 2020, arXiv:2003.05997, section 4.1; MacQueen, 1967).

    Until the first step they are random directions, which divide tokens as a hash does. That step begins them anew from
    all tokens that it was made of: each becomes the direction of those nearest to it; one that no token chose is drawn
    with the mean of the tokens and their spread. Then step t moves them by 1 / t, and no less than by 1 - decay.
    """

    def __init__(self, num_heads: int, num_clusters: int, head_dim: int, decay: float):
        value = torch.empty(num_heads, num_clusters, head_dim)
        super().__init__(value.copy_(random_directions(value.shape)))
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def init_parameters(self, std: float) -> None:
        init.copy_(self.value, random_directions(self.value.shape))
        init.zeros_(self.steps)

    def affinity(self, tokens: torch.Tensor) -> torch.Tensor:
        """How near tokens [batch, length, heads, dim], all of one length, are to each centroid: [batch, heads, length,
        clusters]. In float32 at least, so that what chooses does not depend on how a text is cut."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.no_grad(), without_autocast(tokens):
            return tokens.to(wide).transpose(1, 2) @ self.value.to(wide).transpose(1, 2)

    def nearest(self, affinity: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, clusters] -> [batch, heads, length], the choice that no gradient passes."""
        return affinity.argmax(-1)

    @torch.no_grad()
    def follow(self, tokens: torch.Tensor, nearest: torch.Tensor, documents: torch.Tensor | None) -> None:
        """In training, remember the real tokens [batch, length, heads, dim] of each cluster until the next step."""
        if not self.learning:
            return
        wide = torch.promote_types(tokens.dtype, torch.float32)
        heads, clusters, dim = self.value.shape
        one = torch.ones_like(tokens[..., :1], dtype=wide)
        counted = torch.cat((F.normalize(tokens.to(wide), dim=-1), one), dim=-1)
        if documents is not None:
            counted = counted * (documents > 0)[..., None, None]
        place = nearest.transpose(1, 2) + clusters * torch.arange(heads, device=tokens.device)
        seen = counted.new_zeros(heads * clusters, dim + 1).index_add(0, place.flatten(), counted.flatten(0, 2))
        self.observe(seen.unflatten(0, (heads, clusters)))

    def update(self, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        total, count = seen[..., :-1], seen[..., -1:]
        steps, value = int(self.steps), value.to(seen.dtype)
        decay = min(self.decay, steps / (steps + 1))
        idle = value
        if steps == 0:
            mean = total.sum(1, keepdim=True) / count.sum(1, keepdim=True).clamp(min=1)
            idle = F.normalize(mean + (1 - mean.square().sum(-1, keepdim=True)).clamp(min=0).sqrt() * value, dim=-1)
        self.steps += 1
        return torch.where(count > 0, decay * value + (1 - decay) * F.normalize(total, dim=-1), idle)


def random_directions(shape: torch.Size) -> torch.Tensor:
    """Vectors of length 1 along the last dimension, the same in all processes and for any device."""
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return F.normalize(draws, dim=-1)
