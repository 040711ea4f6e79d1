"""Which experts a token takes, or which tokens an expert, and how much each answer counts."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..ops.documents import find_documents
from ..ops.precision import without_autocast
from .record import RouterLogits


class Router(nn.Module):
    """The probability that an expert is right for a token; those who choose by it differ. Built from (config). The
    logits pass through `record.py`, and the choice that no gradient passes is made in `choose`."""

    gate_class: type[nn.Linear] = nn.Linear
    unquantized = ("gate", "group_gate")

    def __init__(self, config):
        super().__init__()
        self.gate = self.gate_class(config.hidden_size, config.num_local_experts, bias=False)
        self.logits = RouterLogits()

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, size] -> [tokens, experts], of which softmax makes the probability that an expert is right."""
        return self.gate(tokens)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of being right, of each expert, in float32; both [tokens, experts]."""
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class TopKRouter(Router):
    """The k likeliest experts of each token, and their probabilities, made to sum to one (arXiv:2401.04088, section 2).

    Where tokens choose, a router answers

        router(tokens) -> index, weight

    for tokens [tokens, size] with the experts that each token takes and how much the answer of each counts, both
    [tokens, choices]. What tokens took in the end is told to `follow`.
    """

    sums_to_one = True  # the weights of a token

    def __init__(self, config):
        super().__init__(config)
        self.top_k = config.num_experts_per_tok

    def preferences(self, probabilities: torch.Tensor) -> torch.Tensor:
        """What the greatest numbers are chosen of, both [tokens, experts]; none with a gradient."""
        return probabilities

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """[tokens, experts] -> [tokens, choices]"""
        return scores.topk(self.top_k, dim=-1).indices

    def taken(self, logits: torch.Tensor) -> torch.Tensor:
        """What is chosen by logits; [tokens, experts] -> [tokens, choices]."""
        return self.choose(self.preferences(self.probabilities(logits)))

    def weigh(self, chosen: torch.Tensor) -> torch.Tensor:
        """The probabilities of what was chosen -> what the answers count; both [tokens, choices]."""
        return chosen / chosen.sum(-1, keepdim=True)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits(self.score(tokens))
        probabilities = self.probabilities(logits)
        index = self.choose(self.preferences(probabilities))
        return index, self.weigh(probabilities.gather(-1, index)).to(tokens.dtype)

    def follow(self, chosen: torch.Tensor) -> None:
        """[tokens, choices] as `RouterChoices` records them, of which a router may learn."""


class PreciseLinear(nn.Linear):
    """A Linear that computes in float32, whatever its input and autocast are (arXiv:2101.03961, section 2.4)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            return F.linear(x.to(precise), self.weight.to(precise))


class SwitchRouter(TopKRouter):
    """The likeliest experts of each token, whose answers count by their probabilities as these are; in float32, and in
    training from inputs that vary by `router_jitter_noise` (Fedus et al., 2021, arXiv:2101.03961, equation 2 and
    section 2.4)."""

    gate_class = PreciseLinear
    sums_to_one = False

    def __init__(self, config):
        super().__init__(config)
        self.jitter = config.router_jitter_noise

    def score(self, tokens):
        if self.training and self.jitter:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.gate(tokens)

    def weigh(self, chosen):
        return chosen


class HierarchicalRouter(TopKRouter):
    """The likeliest groups of experts, and in each its likeliest experts: a mixture of mixtures (Shazeer et al., 2017,
    arXiv:1701.06538, appendix B; Jordan and Jacobs, 1994).

    p(expert) = p(group) p(expert | group), whose logarithms are the logits. An answer counts by p(group) times
    p(expert | group), where each is made to sum to one over what was chosen. A group is of experts side by side.
    """

    def __init__(self, config):
        super().__init__(config)
        self.groups, self.top_groups = config.num_expert_groups, config.num_groups_per_tok
        self.group_gate = self.gate_class(config.hidden_size, self.groups, bias=False)

    def score(self, tokens):
        groups, experts = self.group_gate(tokens), self.gate(tokens).unflatten(-1, (self.groups, -1))
        precise = torch.promote_types(tokens.dtype, torch.float32)
        joint = groups.log_softmax(-1, dtype=precise)[..., None] + experts.log_softmax(-1, dtype=precise)
        return joint.flatten(-2)

    def choose(self, scores):
        of_groups = scores.unflatten(-1, (self.groups, -1))
        group = of_groups.sum(-1).topk(self.top_groups, dim=-1).indices[..., None]
        size = of_groups.shape[-1]
        within = of_groups.gather(-2, group.expand(-1, -1, size)).topk(self.top_k // self.top_groups, dim=-1).indices
        return (group * size + within).flatten(-2)

    def forward(self, tokens):
        scores = self.probabilities(self.logits(self.score(tokens)))
        index = self.choose(scores)
        group = index.unflatten(-1, (self.top_groups, -1))[..., 0] // (scores.shape[-1] // self.groups)
        of_group = scores.unflatten(-1, (self.groups, -1)).sum(-1).gather(-1, group)
        within = scores.gather(-1, index).unflatten(-1, (self.top_groups, -1))
        weight = self.weigh(of_group)[..., None] * self.weigh(within)
        return index, weight.flatten(-2).to(tokens.dtype)


class ExpertChoiceRouter(Router):
    """The k tokens of a document that each expert finds likeliest to be its own, and their probabilities; k is a share
    of the document's real tokens, rounded up (Zhou et al., 2022, arXiv:2202.09368, section 3.2).

        router(hidden_states, documents) -> token, weight

    for [batch, length, size] with the tokens, counted over the batch, that each expert takes, and how much its answer
    counts, both [taken, experts].
    """

    def __init__(self, config):
        super().__init__(config)
        self.share = config.token_share

    def choose(self, scores: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        """scores [batch, length, experts] -> [taken, experts]; among equals, the first of the text."""
        batch, length = scores.shape[:2]
        if documents is None:
            best = scores.argsort(dim=1, descending=True, stable=True)[:, : whole_share(self.share, length)]
            return (best + length * torch.arange(batch, device=best.device)[:, None, None]).flatten(0, 1)
        text = find_documents(documents)
        best = scores.flatten(0, 1)[text.token].argsort(dim=0, descending=True, stable=True)
        best = best.gather(0, text.row[best].argsort(dim=0, stable=True))  # the same, document by document
        room = torch.tensor([whole_share(self.share, size) for size in text.lengths.tolist()], device=best.device)
        return text.token[best[text.place < room[text.row]]]

    def forward(self, hidden_states: torch.Tensor, documents: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.probabilities(self.logits(self.score(hidden_states.flatten(0, -2))))
        token = self.choose(scores.view(*hidden_states.shape[:2], -1), documents)
        return token, scores.gather(0, token).to(hidden_states.dtype)


def whole_share(share: float, tokens: int) -> int:
    """ceil(share * tokens), where a share made for a whole number may be rounded up."""
    return math.ceil(share * tokens - 1e-6)


class SoftRouter(nn.Module):
    """No choice: every slot of an expert is a mean of all tokens of a document, and every token's answer a mean of what
    experts make of the slots (Puigcerver et al., 2023, arXiv:2308.00951, section 2.1, in the form of section 2.3).

        router(rows, real) -> dispatch, combine

    for a document in each of the rows [documents, length, size], real [documents, length] where it has ended in some,
    with softmax over tokens and softmax over slots of scale cos(x, phi), both [documents, length, slots].
    """

    def __init__(self, config):
        super().__init__()
        self.phi = nn.Parameter(torch.empty(config.num_local_experts * config.slots_per_expert, config.hidden_size))
        self.scale = nn.Parameter(torch.ones(1))

    def init_parameters(self, std: float) -> None:
        init.normal_(self.phi, std=std)
        init.ones_(self.scale)

    def forward(self, rows: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        precise = torch.promote_types(rows.dtype, torch.float32)
        with without_autocast(rows):
            slots = self.scale.to(precise) * F.normalize(self.phi.to(precise), dim=-1)
            logits = F.normalize(rows.to(precise), dim=-1) @ slots.mT
            over_tokens = logits if real is None else logits.masked_fill(~real[..., None], -math.inf)
            return over_tokens.softmax(-2).to(rows.dtype), logits.softmax(-1).to(rows.dtype)
