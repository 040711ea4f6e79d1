"""S6, the layer of Mamba (Gu and Dao, 2023, arXiv:2312.00752): a state space that chooses what it takes in."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...layers.cache import RecurrentCacheLayer
from ...layers.mixer import PiecewiseMixer, carry_on
from ...layers.short_convolution import ShortConvolution
from ...layers.steps import initial_step_bias
from ...ops.selective_scan import chunk_selective_scan, recurrent_selective_scan
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from .configuration_s6 import ArchS6Config


class S6(PiecewiseMixer):
    """Projection, short convolution, the selective scan, a skip, a gate (sections 3.2 to 3.4, figure 3).

    With x the convolved projection, step sizes dt = softplus(dt_proj(of x's own)), and B and C projections of x:
    state = exp(-dt exp(A_log)) state + B (dt x), y = C state + D x, for each channel by itself.
    """

    state_parameters = ("A_log", "D", "dt_proj.bias")

    def __init__(self, config: ArchS6Config, layer_idx: int):
        super().__init__(config, layer_idx)
        inner, rank = config.inner_size, config.time_step_rank
        self.steps = config.time_step_min, config.time_step_max, config.time_step_floor
        self.sizes = rank, config.state_size, config.state_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.attention_bias)
        self.convolution = ShortConvolution(inner, config.conv_kernel, config.use_conv_bias)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(config.state_size, inner))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)

    def init_parameters(self, std: float) -> None:
        """A = -1, -2, ... for the states of each channel (S4D-Real)."""
        states, inner = self.A_log.shape
        init.copy_(self.A_log, torch.arange(1.0, states + 1).log()[:, None].expand(-1, inner))
        init.ones_(self.D)
        init.uniform_(self.dt_proj.weight, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
        init.copy_(self.dt_proj.bias, initial_step_bias(inner, *self.steps))

    def mix(
        self, hidden_states: torch.Tensor, documents: torch.Tensor | None, memory: RecurrentCacheLayer | None
    ) -> torch.Tensor:
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        x, convolved = self.convolution(x, documents, memory)
        x = F.silu(x, inplace=not x.requires_grad)
        step, key, query = self.x_proj(x).split(self.sizes, dim=-1)

        wide = torch.promote_types(x.dtype, torch.float32)
        tensors = x, F.softplus(self.dt_proj(step).to(wide)), -self.A_log.to(wide).exp(), key, query
        forms = recurrent_selective_scan, chunk_selective_scan
        output, state = carry_on(forms, memory, "state", tensors, documents=documents)
        if memory is not None:
            memory.write(hidden_states.shape[1], **convolved, **state)
        return self.out_proj(torch.addcmul(output, x, self.D).to(gate.dtype) * F.silu(gate))


class ArchS6Model(Backbone):
    config: ArchS6Config
    mixers = {"s6": S6}


class ArchS6ForCausalLM(CausalLM):
    config: ArchS6Config
    backbone = ArchS6Model


class ArchS6ForSequenceClassification(SequenceClassification):
    config: ArchS6Config
    backbone = ArchS6Model


class ArchS6ForTokenClassification(TokenClassification):
    config: ArchS6Config
    backbone = ArchS6Model


class ArchS6ForQuestionAnswering(QuestionAnswering):
    config: ArchS6Config
    backbone = ArchS6Model
