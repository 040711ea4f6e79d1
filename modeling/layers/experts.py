"""Feed-forwards side by side, computed for the tokens that take them (Shazeer et al., 2017, arXiv:1701.06538)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    grouped_mm_experts_forward,
    use_experts_implementation,
)

from .feed_forward import MLP, GatedMLP


def expert_size(config) -> int:
    """The width inside an expert."""
    return config.moe_intermediate_size or config.intermediate_size


class SideBySide(nn.Module):
    """Feed-forwards without biases: down(activate(first(x))) for each expert.

    `forward` is the definition, which `set_experts_implementation("eager")` chooses; by default they are computed by
    `sorted_experts_forward`. Expert parallelism marks the choices that other processes compute by an index past the
    last expert.
    """

    first_name: str  # the names of parameters, and `_apply_gate`, are what every implementation reads
    alone: type[MLP]  # such a feed-forward by itself
    first_parts: tuple[str, ...]  # its projections that are one here, each as wide as the inside of an expert

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_local_experts
        size, inner_size = config.hidden_size, expert_size(config)
        first_size = len(self.first_parts) * inner_size
        setattr(self, self.first_name, nn.Parameter(torch.empty(self.num_experts, first_size, size)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, size, inner_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def init_parameters(self, std: float) -> None:
        init.normal_(self.first_proj, std=std)
        init.normal_(self.down_proj, std=std)

    @property
    def first_proj(self) -> torch.Tensor:
        """[experts, first parts * inner size, size]"""
        return getattr(self, self.first_name)

    def activate(self, projected: torch.Tensor) -> torch.Tensor:
        """[tokens, first parts * inner size] -> [tokens, inner size]"""
        return self.act_fn(projected)

    def _apply_gate(self, projected: torch.Tensor) -> torch.Tensor:
        """`activate` as fast as it can be done."""
        return self.activate(projected)

    def forward(self, tokens: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """tokens [tokens, size], index and weight [tokens, choices] -> [tokens, size]"""
        output = torch.zeros_like(tokens)
        weights = zip(self.first_proj.unbind(), self.down_proj.unbind(), strict=True)
        for expert, (first_proj, down_proj) in enumerate(weights):
            token, choice = torch.where(index == expert)
            inner = self.activate(F.linear(tokens[token], first_proj))
            answer = F.linear(inner, down_proj) * weight[token, choice, None]
            output = output.index_add(0, token, answer.to(output.dtype))
        return output


@use_experts_implementation(has_gate=False)
class DenseExperts(SideBySide):
    """down(act(up(x))), as `MLP`."""

    first_name = "up_proj"
    alone = MLP
    first_parts = ("up_proj",)


@use_experts_implementation
class Experts(SideBySide):
    """down(act(gate(x)) * up(x)), as `GatedMLP`."""

    first_name = "gate_up_proj"
    alone = GatedMLP
    first_parts = ("gate_proj", "up_proj")

    def activate(self, projected):
        gate, up = projected.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _apply_gate(self, projected):
        # In place saves memory traffic; under autograd it would spoil the backward of relu, which keeps its answer
        if torch.is_grad_enabled():
            return self.activate(projected)
        gate, up = projected.chunk(2, dim=-1)
        return self.act_fn(gate).mul_(up)


class SeparateExperts(nn.ModuleList):
    """Such feed-forwards as modules, of projections that quantisation knows, and adapters by their names; computed one
    after another."""

    def __init__(self, config, kind: type[SideBySide]):
        self.num_experts = config.num_local_experts
        super().__init__(kind.alone(config, 0, expert_size(config)) for _ in range(self.num_experts))

    @staticmethod
    def apart(experts: SideBySide) -> dict[str, torch.Tensor]:
        """The state of experts side by side as that of separate ones."""
        state = {}
        for number, (first, down) in enumerate(zip(experts.first_proj, experts.down_proj, strict=True)):
            firsts = zip(experts.first_parts, first.chunk(len(experts.first_parts)), strict=True)
            state |= {f"{number}.{name}.weight": part for name, part in (*firsts, ("down_proj", down))}
        return state

    def forward(self, tokens: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `SideBySide.forward`; those that no token takes are left out where nothing learns."""
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self):
            token, choice = torch.where(index == number)
            if len(token) or torch.is_grad_enabled():
                answer = expert(tokens[token]) * weight[token, choice, None]
                output = output.index_add(0, token, answer.to(output.dtype))
        return output


def sorted_experts_forward(
    self: SideBySide, tokens: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """As `SideBySide.forward`: choices are sorted by expert once, so that each expert takes its own from one piece.

    On a GPU, and where torch compiles, transformers' grouped products do the same without asking how many each has.
    """
    known_to_kernel = tokens.device.type != "cpu" and tokens.dtype != torch.float64
    if known_to_kernel or torch.compiler.is_compiling():
        return grouped_mm_experts_forward(self, tokens, index, weight)
    choices, learning = index.flatten(), torch.is_grad_enabled()
    counts = choices.bincount(minlength=self.num_experts).tolist()[: self.num_experts]
    # One expert at least, though none be chosen: its weights then get a gradient, of zeros
    busy = [expert for expert, count in enumerate(counts) if count] or [0]
    sizes, order = [counts[expert] for expert in busy], choices.argsort()[: sum(counts)]
    token = order // index.shape[1]
    # The backward of one gather is one pass over the tokens; without it a part is gathered when it is needed, and stays
    # in the cache of the processor
    given = tokens.index_select(0, token).split(sizes) if learning else None
    shares = weight.flatten().index_select(0, order)[:, None].split(sizes)
    first_projs, down_projs = self.first_proj, self.down_proj
    if learning:  # one backward for all experts; without one only those that are chosen are looked at
        first_projs, down_projs = first_projs.unbind(), down_projs.unbind()
    output = torch.zeros_like(tokens)
    for place, (expert, part, share) in enumerate(zip(busy, token.split(sizes), shares, strict=True)):
        rows = given[place] if learning else tokens.index_select(0, part)
        answer = F.linear(self._apply_gate(F.linear(rows, first_projs[expert])), down_projs[expert])
        share = share.to(answer.dtype)
        answer = answer * share if learning else answer.mul_(share)  # memory traffic is what can be saved here
        output = output.index_add_(0, part, answer.to(output.dtype))
    return output


SORTED = "sorted"
ALL_EXPERTS_FUNCTIONS.register(SORTED, sorted_experts_forward)
