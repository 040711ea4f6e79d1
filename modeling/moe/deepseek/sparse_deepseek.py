"""The sparse feed-forward of DeepSeek-V2 and V3: many small experts, and some that all tokens take."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...layers.feed_forward import GatedMLP
from ...layers.routers import PreciseLinear, TopKRouter
from ...layers.side_loss import SideLoss
from ...layers.sparse import SparseFeedForward, numbers_in_batch
from ...layers.training_buffer import TrainingBuffer
from .configuration_deepseek import ArchDeepSeekConfig


class GreedyRouter(TopKRouter):
    """The likeliest experts of each token by a softmax, whose answers count by their probabilities times a factor
    (arXiv:2405.04434, section 2.2)."""

    gate_class = PreciseLinear

    def __init__(self, config: ArchDeepSeekConfig):
        super().__init__(config)
        self.num_groups, self.groups_taken = config.n_group, config.topk_group
        self.normed, self.factor = config.norm_topk_prob, config.routed_scaling_factor

    def weigh(self, chosen):
        if self.normed:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        return chosen * self.factor


class GroupLimitedRouter(GreedyRouter):
    """The same within the best groups of experts: those with the likeliest one (section 2.2.2)."""

    def preferences(self, probabilities):
        if self.groups_taken == self.num_groups:
            return probabilities
        grouped = probabilities.unflatten(-1, (self.num_groups, -1))
        best = self.worth(grouped).topk(self.groups_taken, dim=-1).indices
        taken = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~taken[..., None], float("-inf")).flatten(-2)

    def worth(self, grouped: torch.Tensor) -> torch.Tensor:
        """[tokens, groups, experts of a group] -> [tokens, groups]"""
        return grouped.amax(-1)


class CorrectionBias(TrainingBuffer):
    """What is added to the scores of experts where they are chosen, and nowhere else, so that all are equally busy
    without a loss: after each optimizer step more by `rate` for those that fewer tokens took than the mean, less for
    those that more took (Wang et al., 2024, arXiv:2408.15664; arXiv:2412.19437, section 2.1.2). In float32 always."""

    def __init__(self, num_experts: int, rate: float):
        super().__init__(torch.zeros(num_experts, dtype=torch.float32))
        self.rate = rate

    def init_parameters(self, std: float) -> None:
        init.zeros_(self.value)

    def update(self, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return value + self.rate * (seen.mean() - seen).sign()

    def _apply(self, fn, *args, **kwargs):
        """A model of another type leaves this as it is: in a narrow one a step would be lost in rounding."""
        before = self.value
        super()._apply(fn, *args, **kwargs)
        if self.value.dtype != before.dtype:
            self.value = before.to(self.value.device)
        return self


class BalancedRouter(GroupLimitedRouter):
    """Experts by sigmoids, whose choice a bias corrects, within the groups whose best two are worth most (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2 and equations 12 to 16)."""

    def __init__(self, config: ArchDeepSeekConfig):
        super().__init__(config)
        self.bias = CorrectionBias(config.num_local_experts, config.router_bias_update_rate)

    def probabilities(self, logits):
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()

    def preferences(self, probabilities):
        return super().preferences(probabilities.detach() + self.bias.value)

    def worth(self, grouped):
        return grouped.topk(2, dim=-1).values.sum(-1)

    @torch.no_grad()
    def follow(self, chosen):
        if self.bias.learning:
            numbers = torch.arange(len(self.bias.value), device=chosen.device)
            self.bias.observe((chosen.flatten()[:, None] == numbers).sum(0).float())


ROUTERS = {"greedy": GreedyRouter, "group_limited_greedy": GroupLimitedRouter, "noaux_tc": BalancedRouter}


class DeepSeekFeedForward(SparseFeedForward):
    """sum over the chosen experts of weight * expert(x) + shared(x), where shared experts side by side are one."""

    def __init__(self, config: ArchDeepSeekConfig, layer_idx: int):
        self.router_class = ROUTERS[config.topk_method]
        super().__init__(config, layer_idx)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = GatedMLP(config, layer_idx, config.n_shared_experts * config.moe_intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        documents: torch.Tensor | None = None,
        side_loss: SideLoss | None = None,
        layer_idx: int = 0,
        **context,
    ) -> torch.Tensor:
        answer = super().forward(hidden_states, documents)
        if self.shared_experts is not None:
            answer = answer + self.shared_experts(hidden_states)
        if side_loss is None:
            return answer
        scores = self.router.probabilities(self.router.gate(hidden_states))
        loss, tokens = sequence_balance(scores, self.router.top_k, documents)
        return answer + side_loss.attach(layer_idx, loss, tokens).to(answer.dtype)


def sequence_balance(
    probabilities: torch.Tensor, top_k: int, documents: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How unequally the experts of a document are busy, over its tokens, added up, and the number of all real tokens.

    experts * sum over experts of (choices per token / top_k) * (mean share of probability), of each document: 1 where
    all are equally busy (arXiv:2412.19437, equations 17 to 20). A document counts by its length, so that the pieces of
    a batch add up.

    probabilities [batch, length, experts], of which the greatest are counted as chosen; documents [batch, length].
    """
    batch, length, experts = probabilities.shape
    if documents is None:
        documents = torch.ones(batch, length, dtype=torch.long, device=probabilities.device)
    number, count = numbers_in_batch(documents)
    real = (documents.flatten() > 0)[:, None].to(probabilities.dtype)
    share = F.normalize(probabilities, p=1, dim=-1).flatten(0, 1)
    taken = torch.zeros_like(share).scatter_(-1, share.topk(top_k, dim=-1).indices, 1.0)
    each = torch.cat((share, taken, torch.ones_like(real)), dim=-1) * real
    total, chosen, tokens = (
        each.new_zeros(count, 2 * experts + 1).index_add(0, number, each).split((experts, experts, 1), dim=-1)
    )
    loss = (experts / top_k * total * chosen / tokens.clamp(min=1)).sum()
    return loss, tokens.sum()


class FurtherToken(nn.Module):
    """One more layer that names the token after the next one: norm(layer(projection(norm(embedding), norm(hidden)))),
    of a position's hidden states and the embedding of the token that comes next (multi-token prediction:
    arXiv:2412.19437, section 2.2)."""

    def __init__(self, model):
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.norm = (model.make_norm() for _ in range(3))
        self.projection = nn.Linear(2 * model.config.hidden_size, model.config.hidden_size, bias=False)
        self.layer = model.make_layer(model.config.num_hidden_layers - 1)

    def forward(self, hidden_states: torch.Tensor, embeddings: torch.Tensor, **context) -> torch.Tensor:
        joined = torch.cat((self.embedding_norm(embeddings), self.hidden_norm(hidden_states)), dim=-1)
        return self.norm(self.layer(self.projection(joined), **context))
