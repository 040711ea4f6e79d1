"""Which experts a token takes, and how much the answer of each counts."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.precision import without_autocast
from .record import RouterLogits


class TopKRouter(nn.Module):
    """The k likeliest experts of each token, and their probabilities, made to sum to one (arXiv:2401.04088, section 2).

    A router is built from (config) and answers

        router(tokens) -> index, weight

    for tokens [tokens, size] with the experts that each token takes and how much the answer of each counts, both
    [tokens, choices]. The choice that no gradient passes is made in `choose`; the logits pass through `record.py`. What
    tokens took in the end is told to `follow`.
    """

    gate_class: type[nn.Linear] = nn.Linear

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = self.gate_class(config.hidden_size, config.num_local_experts, bias=False)
        self.logits = RouterLogits()

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, size] -> [tokens, experts], of which softmax makes the probability that an expert is right."""
        return self.gate(tokens)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of being right, of each expert, in float32; both [tokens, experts]."""
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def preferences(self, probabilities: torch.Tensor) -> torch.Tensor:
        """What the greatest numbers are chosen of, both [tokens, experts]; none with a gradient."""
        return probabilities

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """[tokens, experts] -> [tokens, choices]"""
        return scores.topk(self.top_k, dim=-1).indices

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

    def __init__(self, config):
        super().__init__(config)
        self.jitter = config.router_jitter_noise

    def score(self, tokens):
        if self.training and self.jitter:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.gate(tokens)

    def weigh(self, chosen):
        return chosen
