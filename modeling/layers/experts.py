"""Feed-forwards of many experts, of which each token takes a few (Shazeer et al., 2017, arXiv:1701.06538)."""

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

from .record import RouterLogits


class TopKRouter(nn.Module):
    """The k likeliest experts of each token, and their probabilities, made to sum to one (arXiv:2401.04088, section 2).

    A router is built from (config) and answers

        router(tokens, **context) -> index, weight

    for tokens [tokens, size] with the experts that each token takes and how much the answer of each counts, both
    [tokens, choices]. The choice that no gradient passes is made in `choose`; the logits pass through `record.py`.
    """

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.logits = RouterLogits()

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """[tokens, experts] -> [tokens, choices]"""
        return scores.topk(self.top_k, dim=-1).indices

    def forward(self, tokens: torch.Tensor, **context) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits(self.gate(tokens))
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        index = self.choose(scores)
        weight = scores.gather(-1, index)
        return index, (weight / weight.sum(-1, keepdim=True)).to(tokens.dtype)


@use_experts_implementation
class Experts(nn.Module):
    """Gated feed-forwards side by side: down(act(gate(x)) * up(x)) for each expert, without biases.

    `forward` is the definition, which `set_experts_implementation("eager")` chooses; by default they are computed by
    `sorted_experts_forward`. Expert parallelism marks the choices that other processes compute by an index past the
    last expert.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_local_experts
        size, inner_size = config.hidden_size, config.moe_intermediate_size or config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner_size, size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, size, inner_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def init_parameters(self, std: float) -> None:
        init.normal_(self.gate_up_proj, std=std)
        init.normal_(self.down_proj, std=std)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[tokens, 2 * inner size] -> [tokens, inner size]; every implementation calls it by this name."""
        gate, up = gate_up.chunk(2, dim=-1)
        activated = self.act_fn(gate)
        # In place saves memory traffic; under autograd it would spoil the backward of relu, which keeps its answer
        return activated * up if torch.is_grad_enabled() else activated.mul_(up)

    def forward(self, tokens: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """tokens [tokens, size], index and weight [tokens, choices] -> [tokens, size]"""
        output = torch.zeros_like(tokens)
        weights = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        for expert, (gate_up_proj, down_proj) in enumerate(weights):
            token, choice = torch.where(index == expert)
            gate, up = F.linear(tokens[token], gate_up_proj).chunk(2, dim=-1)
            answer = F.linear(self.act_fn(gate) * up, down_proj) * weight[token, choice, None]
            output = output.index_add(0, token, answer.to(output.dtype))
        return output


def sorted_experts_forward(
    self: Experts, tokens: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """As `Experts.forward`: choices are sorted by expert once, so that each expert takes its own from one piece.

    On a GPU, and where torch compiles, transformers' grouped products do the same without asking how many each has.
    """
    known_to_kernel = tokens.device.type != "cpu" and tokens.dtype != torch.float64
    if known_to_kernel or torch.compiler.is_compiling():
        return grouped_mm_experts_forward(self, tokens, index, weight)
    choices = index.flatten()
    order = choices.argsort()
    counts = choices.bincount(minlength=self.num_experts).tolist()[: self.num_experts]
    ends = torch.tensor(counts).cumsum(0).tolist()
    weights = tuple(zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True))
    token, weight = order // index.shape[1], weight.flatten()[order]
    output = torch.zeros_like(tokens)
    # One expert at least, though none be chosen: its weights then get a gradient, of zeros
    for expert in [expert for expert, count in enumerate(counts) if count] or [0]:
        gate_up_proj, down_proj = weights[expert]
        part = slice(ends[expert] - counts[expert], ends[expert])
        inner = self._apply_gate(F.linear(tokens[token[part]], gate_up_proj))
        answer = F.linear(inner, down_proj)
        answer = answer.mul_(weight[part, None].to(answer.dtype))  # in place: memory traffic is what can be saved here
        output = output.index_add_(0, token[part], answer.to(output.dtype))
    return output


SORTED = "sorted"
ALL_EXPERTS_FUNCTIONS.register(SORTED, sorted_experts_forward)


class SparseFeedForward(nn.Module):
    """sum over the chosen experts of weight * expert(x); `router` chooses."""

    router_class: type[nn.Module] = TopKRouter

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.router = self.router_class(config)
        self.experts = Experts(config)

    def forward(self, hidden_states: torch.Tensor, **context) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        return self.experts(tokens, *self.router(tokens, **context)).view_as(hidden_states)
