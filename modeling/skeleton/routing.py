"""What is asked of routers beside good answers: that experts be equally busy, and logits small."""

from collections.abc import Callable, Sequence
from functools import wraps

import torch


def load_balancing(
    router_logits: Sequence[torch.Tensor],
    taken: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    real: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """experts * sum over experts of (choices per token) * (mean probability): `top_k` where all are equally busy, more
    elsewhere (Fedus et al., 2021, arXiv:2101.03961, equations 4 to 6; over all layers at once, as in Mixtral).

    router_logits: [tokens, experts] of each layer; taken: logits -> [tokens, choices] the experts that tokens take, of
    each; real: [tokens] (bool) of each, those that are no padding.
    """
    chosen, probability, tokens = 0.0, 0.0, 0
    for layer, logits in enumerate(router_logits):
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        marked = torch.zeros_like(scores).scatter_(-1, taken[layer](logits), 1.0)
        if real is not None:
            scores, marked = (each * real[layer][:, None] for each in (scores, marked))
        chosen, probability = chosen + marked.sum(0), probability + scores.sum(0)
        tokens = tokens + (len(logits) if real is None else real[layer].sum())
    if real is not None:
        tokens = tokens.clamp(min=1)
    return router_logits[0].shape[-1] * (chosen / tokens * (probability / tokens)).sum()


def router_z(router_logits: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean over tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al., 2022, arXiv:2202.08906, equation 5)."""
    total, tokens = 0.0, torch.zeros((), dtype=torch.long, device=router_logits[0].device)
    for logits, there in zip(router_logits, real, strict=True):
        precise = torch.promote_types(logits.dtype, torch.float32)
        total = total + (logits.to(precise).logsumexp(-1).square() * there).sum()
        tokens = tokens + there.sum()
    return total / tokens.clamp(min=1)


def with_choices(forward: Callable) -> Callable:
    """The forward of a backbone, whose routers record what they chose wherever they record their logits."""

    @wraps(forward)
    def call(self, *args, output_router_logits: bool | None = None, **kwargs):
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return forward(self, *args, output_router_logits=asked, output_router_choices=asked, **kwargs)

    return call
