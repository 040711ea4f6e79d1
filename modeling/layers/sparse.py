"""Feed-forwards of many experts, of which each token takes a few (Shazeer et al., 2017, arXiv:1701.06538)."""

import torch
from torch import nn

from .experts import DenseExperts, Experts, SideBySide
from .record import RouterChoices
from .routers import SwitchRouter, TopKRouter


class SparseFeedForward(nn.Module):
    """sum over the chosen experts of weight * expert(x); `router` chooses.

    In training an expert may have room for so many tokens of a document alone (`expert_capacity_factor`): to those that
    come too late it answers nothing, and the residual carries them on. In evaluation it has room for all, since what a
    token is answered must not rest on what comes beside it, unless `eval_capacity_factor` says otherwise.
    """

    reads_documents = True  # what the layer is told of its tokens: padding, and which are of one document
    router_class: type[nn.Module] = TopKRouter
    experts_class: type[SideBySide] = Experts

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.router = self.router_class(config)
        self.experts = self.experts_class(config)
        self.choices = RouterChoices()
        self.capacity_factor = {True: config.expert_capacity_factor, False: config.eval_capacity_factor}

    def forward(self, hidden_states: torch.Tensor, documents: torch.Tensor | None = None, **context) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        index, weight = self.router(tokens)
        factor, chosen = self.capacity_factor[self.training], index
        if factor is not None:
            late = come_late(index.unflatten(0, hidden_states.shape[:2]), documents, factor, self.experts.num_experts)
            weight, chosen = weight.masked_fill(late, 0.0), index.masked_fill(late, self.experts.num_experts)
        if documents is not None:
            chosen = chosen.masked_fill(documents.flatten()[:, None] == 0, -1)
        self.router.follow(self.choices(chosen))
        return self.experts(tokens, index, weight).view_as(hidden_states)


class SwitchFeedForward(SparseFeedForward):
    """The same of a Switch Transformer (Fedus et al., 2021, arXiv:2101.03961): answers count by their probabilities,
    and experts are dense."""

    router_class = SwitchRouter
    experts_class = DenseExperts


def come_late(index: torch.Tensor, documents: torch.Tensor | None, factor: float, num_experts: int) -> torch.Tensor:
    """Which choices find their expert full, [batch * length, choices] bool.

    An expert has room for ceil(factor * choices / experts) tokens of a document, where choices are those of all its
    real tokens (arXiv:2101.03961, equation 3). All first choices are served before the second ones, each in the order
    of the text (GShard, arXiv:2006.16668, algorithm 1).

    index [batch, length, choices]; documents [batch, length], bool where there is one a row, or None.
    """
    batch, length, choices = index.shape
    documents = index.new_ones(batch, length) if documents is None else documents.long()
    number, among = numbers_in_batch(documents)
    sizes = count(number, among)
    room = (factor * choices / num_experts * sizes - 1e-6).ceil()  # a factor made for whole room may be rounded up
    # A queue for each expert in each document, which choices join in order of service
    queue = (number * num_experts + index.flatten(0, 1).T).flatten()
    order, lengths = queue.argsort(stable=True), count(queue, len(sizes) * num_experts)
    starts = lengths.cumsum(0) - lengths
    place = torch.empty_like(queue)
    place[order] = torch.arange(len(queue), device=queue.device) - starts[queue[order]]
    late = place >= room[queue // num_experts]
    return late.unflatten(0, (choices, -1)).T & (documents.flatten() > 0)[:, None]


def numbers_in_batch(documents: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A number for each document of the batch, and for the padding of each row, [batch * length], and how many numbers
    there may be; documents [batch, length]."""
    batch, length = documents.shape
    most = length if torch.compiler.is_compiling() else int(documents.amax())
    rows = torch.arange(batch, device=documents.device)[:, None]
    return (documents + rows * (most + 1)).flatten(), batch * (most + 1)


def count(numbers: torch.Tensor, among: int) -> torch.Tensor:
    """How often each number from 0 is there; as `bincount`, of known shape."""
    return numbers.new_zeros(among).index_add_(0, numbers, torch.ones_like(numbers))


# Those that `feed_forward_types` may name, of any architecture
SPARSE_FEED_FORWARDS = {"sparse": SparseFeedForward, "switch": SwitchFeedForward}
