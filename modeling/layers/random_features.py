"""Random features whose products are, on average, a kernel of two vectors: the FAVOR+ of the Performer (Choromanski et
al., 2020, arXiv:2009.14794)."""

import torch
from transformers import initialization as init

from ..ops.precision import without_autocast
from .training_buffer import TrainingBuffer


class OrthogonalFeatures(TrainingBuffer):
    """Random directions `value` [features, dim]: Gaussian vectors, those of a block of `dim` at right angles. Others
    are drawn after every `redraw_interval` optimizer steps. They follow from the layer and the number of the step,
    which is saved: all processes, and a run that goes on from a checkpoint, draw the same.

    A module around it calls `count_step` in forward.
    """

    def __init__(self, config, layer_idx: int):
        value = torch.empty(config.num_features, config.head_dim)
        super().__init__(value.copy_(orthogonal_directions(*value.shape, seed_of(layer_idx))))
        self.layer_idx, self.redraw_interval = layer_idx, config.feature_redraw_interval
        self.epsilon = config.kernel_epsilon
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def init_parameters(self, std: float) -> None:
        init.zeros_(self.steps)
        init.copy_(self.value, orthogonal_directions(*self.value.shape, seed_of(self.layer_idx)))

    def count_step(self) -> None:
        """The optimizer step after this forward pass is one of those that are counted."""
        if self.redraw_interval is not None:
            self.observe(self.value.new_ones(()))

    def update(self, value, seen):
        self.steps += 1
        if int(self.steps) % self.redraw_interval:
            return value
        return orthogonal_directions(*value.shape, seed_of(self.layer_idx, int(self.steps))).to(value)

    def projected(self, x: torch.Tensor, scaling: float) -> torch.Tensor:
        """sqrt(scaling) x along all directions, [batch, length, heads, dim] -> [batch, length, heads, features], in
        float32 at least. In memory heads come first, as the products that follow want them."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            directions = self.value.to(wide) * scaling**0.5
            x = x.to(wide).transpose(1, 2)
            return (x.flatten(0, 2) @ directions.mT).unflatten(0, x.shape[:3]).transpose(1, 2)

    def of_queries(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """[..., dim] -> [..., features], each query times any number."""
        raise NotImplementedError

    def of_keys(self, key: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., dim] -> [..., features] and [...], the logarithm of what they are to be multiplied by."""
        raise NotImplementedError


class SoftmaxFeatures(OrthogonalFeatures):
    """exp(w x - |x|^2 / 2) for each direction w: the mean of their products is exp(x y) (lemma 1). No epsilon is added,
    which would draw weights together; what is computed is at most 1."""

    def of_queries(self, query, scaling):
        return self.projected(query, scaling).softmax(-1)

    def of_keys(self, key, scaling):
        logarithm = self.projected(key, scaling)
        largest = logarithm.detach().amax(-1, keepdim=True)
        features = logarithm.sub_(largest).exp_()
        return features, largest.squeeze(-1) - 0.5 * scaling * key.to(features.dtype).square().sum(-1)


class ReLUFeatures(OrthogonalFeatures):
    """max(w x, 0) + epsilon for each direction w: generalised attention (section 2.2)."""

    def of_queries(self, query, scaling):
        return self.projected(query, scaling).relu_() + self.epsilon

    def of_keys(self, key, scaling):
        features = self.of_queries(key, scaling)
        return features, features.new_zeros(features.shape[:-1])


FEATURES = {"softmax": SoftmaxFeatures, "relu": ReLUFeatures}


def seed_of(layer_idx: int, step: int = 0) -> int:
    return (layer_idx << 20) + step  # a generator looks at 32 bits


def orthogonal_directions(count: int, dim: int, seed: int) -> torch.Tensor:
    """[count, dim]: uniformly random orthogonal bases, their vectors as long as Gaussian ones."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(-(-count // dim), dim, dim, generator=generator, device="cpu", dtype=torch.float64)
    bases, triangular = torch.linalg.qr(gaussian)
    bases = bases * triangular.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # without it they are not uniform
    lengths = torch.randn(count, dim, generator=generator, device="cpu", dtype=torch.float64).norm(dim=-1)
    return (bases.mT.flatten(0, 1)[:count] * lengths[:, None]).float()
