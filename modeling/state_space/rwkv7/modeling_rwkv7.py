"""RWKV-7 "Goose" (Peng et al., 2025, arXiv:2503.14456): a recurrence that rewrites what its memory holds."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import OutputRecorder

from ...layers.mixer import Mixer, carry_on
from ...layers.record import HiddenStates
from ...layers.residual import PreNorm
from ...layers.token_shift import TokenShift
from ...ops.delta_rule import chunk_delta_rule, recurrent_delta_rule
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from ..modeling_rwkv import RWKVBackbone
from .configuration_rwkv7 import ArchRWKV7Config

LARGEST_DECAY = math.exp(-0.5)  # the largest log decay per token


class FirstValues:
    """The values of the first layer, which later ones mix into their own."""

    def __init__(self, values: torch.Tensor):
        self.values = values


class ValueResidual(PreNorm):
    """x + f(norm(x)), in a stream that also holds the values of the first layer, behind the hidden states."""

    def __init__(self, config, names, norm):
        super().__init__(config, names, norm)
        self.recorded = HiddenStates()

    @staticmethod
    def enter(hidden_states):
        return torch.cat((hidden_states, torch.zeros_like(hidden_states)), dim=-1)

    @staticmethod
    def leave(stream):
        return stream.chunk(2, dim=-1)[0]

    def forward(self, stream, sublayers, **context):
        before, values = stream.chunk(2, dim=-1)
        first = FirstValues(values)
        after = super().forward(before, sublayers, first_values=first, **context)
        return torch.cat((self.recorded(before, after), first.values), dim=-1)


class LowRankProjection(nn.Module):
    """A projection in two steps, through a few numbers (section 4.1, "loramlp"): of decays and rates."""

    unquantized = ("reduce_proj", "expand_proj")

    def __init__(self, size: int, rank: int, act_fn: nn.Module, bias: bool = True):
        super().__init__()
        self.reduce_proj = nn.Linear(size, rank, bias=False)
        self.act_fn = act_fn
        self.expand_proj = nn.Linear(rank, size, bias=bias)

    def init_parameters(self, std: float) -> None:
        """Nothing but the bias at first."""
        init.zeros_(self.reduce_proj.weight)
        begin_spread(self.expand_proj.weight, 0.1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.expand_proj(self.act_fn(self.reduce_proj(hidden_states)))


class RWKV7TimeMixing(Mixer):
    """Six mixtures of each token and the one before, of which all else is projected; the delta rule; a norm per head,
    the current token's own value by weight, a gate (section 4.1 and figure 1).

    Memory fades by exp(-exp(-1/2) sigmoid(w)) per channel; what it holds for the normed removal key is taken out by the
    rate a, and the value written at a key of its own.
    """

    def __init__(self, config: ArchRWKV7Config, layer_idx: int):
        super().__init__(config, layer_idx)
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.layers = layer_idx, config.num_hidden_layers
        mixes_values = config.value_residual and layer_idx > 0
        self.shift = TokenShift("time_shift")
        self.mix = nn.Parameter(torch.empty(6, size))  # of r, w, k, v, a, g
        self.r_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.k_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.v_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.o_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.w = LowRankProjection(size, config.decay_low_rank_dim, nn.Tanh())
        self.a = LowRankProjection(size, config.a_low_rank_dim, nn.Identity())
        self.v = LowRankProjection(size, config.v_low_rank_dim, nn.Identity()) if mixes_values else None
        self.g = LowRankProjection(size, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.k_k = nn.Parameter(torch.empty(size))
        self.k_a = nn.Parameter(torch.empty(size))
        self.r_k = nn.Parameter(torch.empty(self.num_heads, size // self.num_heads))
        self.head_norm = nn.GroupNorm(self.num_heads, size, eps=64 * config.norm_eps)

    def init_parameters(self, std: float) -> None:
        """As in the authors' code."""
        size, head_dim, (layer, layers) = len(self.k_k), self.r_k.shape[1], self.layers
        place, depth = torch.arange(size), layer / max(layers - 1, 1)
        even, within = place / max(size - 1, 1), 2 * (place % head_dim) / max(head_dim - 1, 1) - 1
        powers = (1 - layer / layers) * torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])
        init.copy_(self.mix, 1 - (place / size) ** powers[:, None])
        curved = within * within.abs()
        init.copy_(self.w.expand_proj.bias, -5.5 + 6 * even ** (1 + depth**0.3) + 2.5 * curved)
        init.copy_(self.a.expand_proj.bias, -0.19 + 0.3 * curved + 0.4 * (even - 0.5))
        if self.v is not None:
            init.copy_(self.v.expand_proj.bias, 0.73 - 0.4 * (even - 0.5))
        init.copy_(self.k_k, 0.71 - 0.1 * (even - 0.5))
        init.constant_(self.k_a, 1.02)
        init.constant_(self.r_k, -0.04)
        for projection, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            begin_spread(projection.weight, gain)
        init.zeros_(self.o_proj.weight)
        init.constant_(self.head_norm.weight, ((layer + 1) / layers) ** 0.7)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        first_values: FirstValues | None = None,
        **kwargs,
    ) -> torch.Tensor:
        memory = self.memory(past_key_values, layer_idx)
        before, shifted = self.shift(hidden_states, attention_mask, memory)
        toward, mix = before - hidden_states, dict(zip("rwkvag", self.mix.to(hidden_states.dtype), strict=True))

        def mixed(name):
            return torch.addcmul(hidden_states, toward, mix[name])

        query, key, value = self.r_proj(mixed("r")), self.k_proj(mixed("k")), self.value(mixed("v"), first_values)
        wide = torch.promote_types(query.dtype, torch.float32)
        log_decay = -LARGEST_DECAY * self.w(mixed("w")).to(wide).sigmoid()
        rate, gate = self.a(mixed("a")).sigmoid(), self.g(mixed("g"))
        removal = F.normalize(self.heads(key * -self.k_k), dim=-1)
        key = key * torch.addcmul(1 - self.k_a, rate, self.k_a)

        query, log_decay, key, value, rate = map(self.heads, (query, log_decay, key, value, rate))
        back = torch.addcmul(removal.new_zeros(()), removal, rate, value=-1.0)
        tensors = query, log_decay, key, value, removal, back
        forms = recurrent_delta_rule, chunk_delta_rule
        output, state = carry_on(forms, memory, "state", tensors, documents=attention_mask)
        if memory is not None:
            memory.write(hidden_states.shape[1], **shifted, **state)

        output = self.heads(self.head_norm(output.flatten(0, 1).flatten(1)).view(hidden_states.shape))
        output = torch.addcmul(output, (query * key * self.r_k).sum(-1, keepdim=True), value)
        return self.o_proj(output.flatten(-2) * gate)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def value(self, mixed: torch.Tensor, first: FirstValues | None) -> torch.Tensor:
        """The values; those of the first layer are told to later ones."""
        value = self.v_proj(mixed)
        if self.v is None:
            if first is not None:
                first.values = value
            return value
        return torch.lerp(value, first.values.to(value.dtype), self.v(mixed).sigmoid())


class RWKV7ChannelMixing(nn.Module):
    """down(relu(up(x))^2), of a mixture of each token and the one before (section 4.2)."""

    def __init__(self, config: ArchRWKV7Config, layer_idx: int):
        super().__init__()
        self.depth = layer_idx / config.num_hidden_layers
        self.shift = TokenShift("channel_shift")
        self.mix = nn.Parameter(torch.empty(config.hidden_size))
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def init_parameters(self, std: float) -> None:
        """As in the authors' code."""
        size = len(self.mix)
        init.copy_(self.mix, 1 - (torch.arange(size) / size) ** (1 - self.depth) ** 4)
        begin_spread(self.up_proj.weight, 1.0)
        init.zeros_(self.down_proj.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        memory = Mixer.memory(past_key_values, layer_idx)
        before, shifted = self.shift(hidden_states, attention_mask, memory)
        if memory is not None:
            memory.write(0, **shifted)
        inner = self.up_proj(torch.lerp(hidden_states, before, self.mix.to(hidden_states.dtype))).relu()
        # Backward needs what was squared; without it the square takes its place
        return self.down_proj(inner.square() if inner.requires_grad else inner.square_())


def begin_spread(weight: torch.Tensor, gain: float) -> None:
    """As long as the authors' orthogonal matrices on average, which take long to make."""
    init.normal_(weight, std=gain * max(weight.shape) ** -0.5)


class ArchRWKV7Model(RWKVBackbone):
    config: ArchRWKV7Config
    mixers = {"rwkv7": RWKV7TimeMixing}
    feed_forwards = Backbone.feed_forwards | {"rwkv7_channel_mixing": RWKV7ChannelMixing}
    residual = ValueResidual
    _can_record_outputs = Backbone._can_record_outputs | {"hidden_states": OutputRecorder(HiddenStates)}


class ArchRWKV7ForCausalLM(CausalLM):
    config: ArchRWKV7Config
    backbone = ArchRWKV7Model


class ArchRWKV7ForSequenceClassification(SequenceClassification):
    config: ArchRWKV7Config
    backbone = ArchRWKV7Model


class ArchRWKV7ForTokenClassification(TokenClassification):
    config: ArchRWKV7Config
    backbone = ArchRWKV7Model


class ArchRWKV7ForQuestionAnswering(QuestionAnswering):
    config: ArchRWKV7Config
    backbone = ArchRWKV7Model
