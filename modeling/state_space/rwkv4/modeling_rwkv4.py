"""RWKV-4 (Peng et al., 2023, arXiv:2305.13048): a recurrence over channels; feed-forwards that see the token before."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ...layers.mixer import Mixer, carry_on
from ...layers.token_shift import TokenShift
from ...ops.wkv import chunk_wkv, recurrent_wkv
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from ..modeling_rwkv import RWKVBackbone
from .configuration_rwkv4 import ArchRWKV4Config


class RWKV4TimeMixing(Mixer):
    """output(sigmoid(receptance) * wkv(key, value)), each projected from a mixture of a token and the one before it.

    `time_mix` [3, hidden_size] is how much of the mixtures for receptance, key and value is the token itself; a channel
    fades by exp(-exp(time_decay)) per token, and adds `time_first` to the key of the current one (equations 11 to 18).
    """

    def __init__(self, config: ArchRWKV4Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_layers = config.num_hidden_layers
        size, inner = config.hidden_size, config.attention_hidden_size
        self.token_shift = TokenShift("time_shift")
        self.time_mix = nn.Parameter(torch.empty(3, size))
        self.time_decay = nn.Parameter(torch.empty(inner))
        self.time_first = nn.Parameter(torch.empty(inner))
        self.receptance = nn.Linear(size, inner, bias=config.attention_bias)
        self.key = nn.Linear(size, inner, bias=config.attention_bias)
        self.value = nn.Linear(size, inner, bias=config.attention_bias)
        self.output = nn.Linear(inner, size, bias=config.attention_bias)

    def init_parameters(self, std: float) -> None:
        """As the official code does: a new layer answers with zeros, and channels fade at many rates."""
        depth, height = self.layer_idx / max(1, self.num_layers - 1), 1 - self.layer_idx / self.num_layers
        size, inner = self.time_mix.shape[1], len(self.time_decay)
        place = torch.arange(size) / size
        key = place**height
        init.copy_(self.time_mix, torch.stack((place ** (0.5 * height), key, key + 0.3 * depth)))
        speed = torch.arange(inner) / max(1, inner - 1)
        init.copy_(self.time_decay, -5 + 8 * speed ** (0.7 + 1.3 * depth))
        init.copy_(self.time_first, math.log(0.3) + 0.5 * ((torch.arange(inner) + 1) % 3 - 1))
        init.normal_(self.value.weight, std=self.value.in_features**-0.5)  # orthogonal there
        for silent in (self.receptance, self.key, self.output):
            init.zeros_(silent.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        memory = self.memory(past_key_values, layer_idx)
        before, shifted = self.token_shift(hidden_states, attention_mask, memory)
        for_receptance, for_key, for_value = torch.lerp(before, hidden_states, self.time_mix[:, None, None])
        receptance = self.receptance(for_receptance).sigmoid()

        wide = torch.promote_types(self.time_decay.dtype, torch.float32)
        tensors = self.key(for_key), self.value(for_value), -self.time_decay.to(wide).exp(), self.time_first
        forms = recurrent_wkv, chunk_wkv
        output, state = carry_on(forms, memory, "state", tensors, documents=attention_mask)
        if memory is not None:
            memory.write(hidden_states.shape[1], **shifted, **state)
        return self.output(receptance * output)


class RWKV4ChannelMixing(nn.Module):
    """sigmoid(receptance) * value(relu(key)^2), each from a mixture of a token and the one before it (equations 19 to
    21). `time_mix` [2, hidden_size] is how much of the mixtures for receptance and key is the token itself. The token
    before is kept beside the states of the layer's mixer, which has to be a recurrence."""

    def __init__(self, config: ArchRWKV4Config, layer_idx: int):
        super().__init__()
        self.height = 1 - layer_idx / config.num_hidden_layers
        self.token_shift = TokenShift("channel_shift")
        self.time_mix = nn.Parameter(torch.empty(2, config.hidden_size))
        self.receptance = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def init_parameters(self, std: float) -> None:
        """As the official code does: a new layer answers with zeros."""
        size = self.time_mix.shape[1]
        mix = (torch.arange(size) / size) ** self.height
        init.copy_(self.time_mix, torch.stack((mix, mix)))
        init.normal_(self.key.weight, std=self.key.in_features**-0.5)  # orthogonal there
        for silent in (self.receptance, self.value):
            init.zeros_(silent.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        memory = Mixer.memory(past_key_values, layer_idx)
        before, shifted = self.token_shift(hidden_states, attention_mask, memory)
        if memory is not None:
            memory.write(0, **shifted)
        for_receptance, for_key = torch.lerp(before, hidden_states, self.time_mix[:, None, None])
        inner = self.key(for_key).relu().square()
        return self.receptance(for_receptance).sigmoid() * self.value(inner)


class ArchRWKV4Model(RWKVBackbone):
    config: ArchRWKV4Config
    mixers = {"rwkv4": RWKV4TimeMixing}
    feed_forwards = Backbone.feed_forwards | {"rwkv4_channel_mixing": RWKV4ChannelMixing}


class ArchRWKV4ForCausalLM(CausalLM):
    config: ArchRWKV4Config
    backbone = ArchRWKV4Model


class ArchRWKV4ForSequenceClassification(SequenceClassification):
    config: ArchRWKV4Config
    backbone = ArchRWKV4Model


class ArchRWKV4ForTokenClassification(TokenClassification):
    config: ArchRWKV4Config
    backbone = ArchRWKV4Model


class ArchRWKV4ForQuestionAnswering(QuestionAnswering):
    config: ArchRWKV4Config
    backbone = ArchRWKV4Model
