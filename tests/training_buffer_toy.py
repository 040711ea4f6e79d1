"""A decoder with one training buffer of each kind: moving centroids, a router bias, features drawn anew."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from hf_arch.modeling.layers.mixer import Mixer
from hf_arch.modeling.layers.training_buffer import TrainingBuffer
from hf_arch.modeling.skeleton.backbone import Backbone
from hf_arch.modeling.skeleton.config import ArchConfig
from hf_arch.modeling.skeleton.heads import CausalLM


@strict
class ToyConfig(ArchConfig):
    model_type = "hf_arch_training_buffer_toy"
    layer_kinds = ("toy",)

    vocab_size: int = 32
    hidden_size: int = 8
    intermediate_size: int = 8
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    initializer_range: float = 0.3
    use_cache: bool = False


class Centroids(TrainingBuffer):
    """Each goes a tenth of the way to the mean of the tokens nearest to it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        nearest = nn.functional.one_hot((hidden_states @ self.value.T).argmax(-1), len(self.value)).flatten(0, 1)
        tokens = nearest.to(hidden_states.dtype).T @ hidden_states.flatten(0, 1)
        self.observe(torch.cat((tokens, nearest.sum(0)[:, None]), dim=-1))
        return self.value[(hidden_states @ self.value.T).argmax(-1)]

    def update(self, value, seen):
        tokens, count = seen[:, :-1], seen[:, -1:]
        return torch.where(count > 0, 0.9 * value + 0.1 * tokens / count.clamp(min=1), value)


class RouterBias(TrainingBuffer):
    """Falls for experts that too many tokens chose, rises for the others."""

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        chosen = (scores + self.value).argmax(-1)
        self.observe(nn.functional.one_hot(chosen, len(self.value)).flatten(0, -2).sum(0))
        return chosen

    def update(self, value, seen):
        return value + 0.05 * (seen.mean() - seen).sign()


class Features(TrainingBuffer):
    """Random directions, others after every optimizer step; and how often they were drawn, and the tokens they saw."""

    def __init__(self, value):
        super().__init__(value)
        self.register_buffer("drawn", torch.zeros((), dtype=torch.long))
        self.register_buffer("tokens", torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.observe(torch.ones_like(hidden_states[..., 0]).sum())
        return (hidden_states @ self.value).cos()

    def update(self, value, seen):
        self.drawn += 1
        self.tokens += seen
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(int(self.drawn)))


class ToyMixer(Mixer):
    def __init__(self, config: ToyConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        size = config.hidden_size
        self.q_proj = nn.Linear(size, size)
        self.router = nn.Linear(size, 3)
        self.experts = nn.Linear(size, 3 * size)
        self.centroids, self.bias = Centroids(torch.zeros(4, size)), RouterBias(torch.zeros(3))
        self.features = Features(torch.zeros(size, size))

    def init_parameters(self, std):
        first = torch.Generator().manual_seed(self.layer_idx)
        init.copy_(self.centroids.value, torch.randn(self.centroids.value.shape, generator=first))
        init.copy_(self.features.value, torch.randn(self.features.value.shape, generator=first))
        init.zeros_(self.features.drawn)
        init.zeros_(self.features.tokens)
        init.zeros_(self.bias.value)

    def forward(self, hidden_states, *args, **kwargs):
        query = self.q_proj(hidden_states)
        scores = self.router(hidden_states)
        chosen = self.bias(scores)[..., None, None]
        experts = self.experts(hidden_states).unflatten(-1, (3, -1))
        expert = experts.gather(-2, chosen.expand(*chosen.shape[:-1], experts.shape[-1])).squeeze(-2)
        gate = scores.softmax(-1).gather(-1, chosen[..., 0])
        return self.centroids(query) * query + gate * expert + self.features(query)


class ToyModel(Backbone):
    config: ToyConfig
    mixers = {"toy": ToyMixer}
    masks = {"toy": lambda **told: None}


class ToyForCausalLM(CausalLM):
    config: ToyConfig
    backbone = ToyModel


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The training buffers of a model by name, as they are now."""
    return {name: value.clone() for name, value in model.named_buffers()}
