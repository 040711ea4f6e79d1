"""SSD, the layer of Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060): a state space whose matrix is a number per head."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...layers.cache import RecurrentCacheLayer
from ...layers.mixer import PiecewiseMixer, carry_on
from ...layers.short_convolution import ShortConvolution
from ...layers.steps import initial_step_bias
from ...ops.decayed_attention import chunk_decayed_attention, recurrent_decayed_attention
from ...ops.gated_norm import gated_rms_norm
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from .configuration_ssd import ArchSSDConfig


class GatedNorm(nn.Module):
    """An RMSNorm of each group of gated numbers, with a weight for every number."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_rms_norm(x, gate, self.weight, self.groups, self.eps)


class SSD(PiecewiseMixer):
    """Projection, short convolution, the recurrence, a skip, a gated norm (section 7.1 and figure 6).

    With step sizes dt = softplus(dt_proj(x) + dt_bias), decays exp(-exp(A_log) dt), and x, B, C the convolved
    projections: state = decay * state + B^T (dt x), y = C state + D x.
    """

    state_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, config: ArchSSDConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_heads, self.n_groups = config.num_attention_heads, config.n_groups
        self.steps = config.time_step_min, config.time_step_max, config.time_step_floor
        self.step_limit = config.time_step_limit
        inner, shared = config.inner_size, config.n_groups * config.state_size
        self.sizes = inner, inner + 2 * shared, config.num_attention_heads  # gate; x, B and C; step sizes
        self.mixed_sizes = inner, shared, shared
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.attention_bias)
        self.convolution = ShortConvolution(self.sizes[1], config.conv_kernel, config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedNorm(inner, config.n_groups, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)

    def init_parameters(self, std: float) -> None:
        """Decays of exp(-dt) to exp(-16 dt); step sizes even in their logarithm."""
        init.copy_(self.dt_bias, initial_step_bias(self.num_heads, *self.steps))
        init.copy_(self.A_log, torch.log(torch.empty(self.num_heads).uniform_(1, 16)))
        init.ones_(self.D)
        init.ones_(self.norm.weight)

    def mix(
        self, hidden_states: torch.Tensor, documents: torch.Tensor | None, memory: RecurrentCacheLayer | None
    ) -> torch.Tensor:
        gate, mixed, step = self.in_proj(hidden_states).split(self.sizes, dim=-1)
        mixed, convolved = self.convolution(mixed, documents, memory)
        x, key, query = F.silu(mixed, inplace=not mixed.requires_grad).split(self.mixed_sizes, dim=-1)
        key, query = (shared.unflatten(-1, (self.n_groups, -1)) for shared in (key, query))
        x = x.unflatten(-1, (self.num_heads, -1))

        wide = torch.promote_types(step.dtype, torch.float32)
        step = F.softplus(step.to(wide) + self.dt_bias.to(wide))
        if self.step_limit is not None:
            step = step.clamp(*self.step_limit)
        tensors = query, key, x, -step * self.A_log.to(wide).exp(), step
        forms = recurrent_decayed_attention, chunk_decayed_attention
        output, state = carry_on(forms, memory, "state", tensors, skip=self.D, documents=documents)
        if memory is not None:
            memory.write(hidden_states.shape[1], **convolved, **state)

        return self.out_proj(self.norm(output.flatten(-2).to(gate.dtype), gate))


class ArchSSDModel(Backbone):
    config: ArchSSDConfig
    mixers = {"ssd": SSD}


class ArchSSDForCausalLM(CausalLM):
    config: ArchSSDConfig
    backbone = ArchSSDModel


class ArchSSDForSequenceClassification(SequenceClassification):
    config: ArchSSDConfig
    backbone = ArchSSDModel


class ArchSSDForTokenClassification(TokenClassification):
    config: ArchSSDConfig
    backbone = ArchSSDModel


class ArchSSDForQuestionAnswering(QuestionAnswering):
    config: ArchSSDConfig
    backbone = ArchSSDModel
