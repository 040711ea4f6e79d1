"""Feed-forwards of many experts, of which each token takes a few (Shazeer et al., 2017, arXiv:1701.06538)."""

import torch
from torch import nn

from ..ops.documents import find_documents
from .experts import DenseExperts, Experts, SeparateExperts, SideBySide
from .record import RouterChoices
from .routers import ExpertChoiceRouter, HierarchicalRouter, SoftRouter, SwitchRouter, TopKRouter, whole_share


class MixtureOfExperts(nn.Module):
    """What `router` brings together of tokens and experts."""

    reads_documents = True  # what the layer is told of its tokens: padding, and which are of one document
    sees_all = False  # whether what a token is answered rests on later ones
    routes = True  # whether there are choices, and logits of them
    tokens_choose = True  # and whether it is tokens who choose, so that experts may be unequally busy
    router_class: type[nn.Module]
    experts_class: type[SideBySide] = Experts

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.num_experts = config.num_local_experts  # `experts` may be this process's share of them
        self.router = self.router_class(config)
        separate = config.separate_experts
        self.experts = SeparateExperts(config, self.experts_class) if separate else self.experts_class(config)

    def evaluations(self, tokens: int) -> int:
        """How many times a document of so many tokens has an expert computed."""
        raise NotImplementedError


class SparseFeedForward(MixtureOfExperts):
    """sum over the chosen experts of weight * expert(x); `router` chooses.

    In training an expert may have room for so many tokens of a document alone (`expert_capacity_factor`): to those that
    come too late it answers nothing, and the residual carries them on. In evaluation it has room for all, since what a
    token is answered must not rest on what comes beside it, unless `eval_capacity_factor` says otherwise.
    """

    router_class = TopKRouter

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.choices = RouterChoices()
        self.capacity_factor = {True: config.expert_capacity_factor, False: config.eval_capacity_factor}

    def evaluations(self, tokens):
        return self.router.top_k * tokens

    def forward(self, hidden_states: torch.Tensor, documents: torch.Tensor | None = None, **context) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        index, weight = self.router(tokens)
        factor, chosen = self.capacity_factor[self.training], index
        if factor is not None:
            late = come_late(index.unflatten(0, hidden_states.shape[:2]), documents, factor, self.num_experts)
            weight, chosen = weight.masked_fill(late, 0.0), index.masked_fill(late, self.num_experts)
        if documents is not None:
            chosen = chosen.masked_fill(documents.flatten()[:, None] == 0, -1)
        self.router.follow(self.choices(chosen))
        return self.experts(tokens, index, weight).view_as(hidden_states)


class SwitchFeedForward(SparseFeedForward):
    """The same of a Switch Transformer (Fedus et al., 2021, arXiv:2101.03961): answers count by their probabilities,
    and experts are dense."""

    router_class = SwitchRouter
    experts_class = DenseExperts


class HierarchicalFeedForward(SparseFeedForward):
    """The same of experts in groups: a token takes some groups, and some experts of each."""

    router_class = HierarchicalRouter


class ExpertChoiceFeedForward(MixtureOfExperts):
    """sum over the experts that chose the token of p(expert) expert(x); all experts are equally busy.

    Which tokens an expert chooses rests on all tokens of the document, so that a decoder would be told of the future.
    """

    sees_all = True
    tokens_choose = False
    router_class = ExpertChoiceRouter

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.choices = RouterChoices()

    def evaluations(self, tokens):
        return self.num_experts * whole_share(self.router.share, tokens)

    def forward(self, hidden_states: torch.Tensor, documents: torch.Tensor | None = None, **context) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        token, weight = self.router(hidden_states, documents)
        experts = torch.arange(self.num_experts, device=token.device)
        self.record(token, documents, tokens.shape[0])
        # Expert by expert
        token, index, weight = (each.T.flatten() for each in (token, experts.expand_as(token), weight))
        answers = self.experts(tokens.index_select(0, token), index[:, None], weight[:, None])
        return torch.zeros_like(tokens).index_add(0, token, answers).view_as(hidden_states)

    def record(self, token: torch.Tensor, documents: torch.Tensor | None, tokens: int) -> None:
        """Of each token the first expert that took it, then the others."""
        experts = torch.arange(self.num_experts, device=token.device)
        taken = torch.zeros(tokens, self.num_experts, dtype=torch.bool, device=token.device).scatter(0, token, True)
        first = torch.where(taken.any(-1), taken.long().argmax(-1), self.num_experts)[:, None]
        chosen = torch.cat((first, torch.where(taken & (experts != first), experts, -1)), dim=-1)
        self.choices(chosen if documents is None else chosen.masked_fill(documents.flatten()[:, None] == 0, -1))


class SoftFeedForward(MixtureOfExperts):
    """combine experts(dispatch^T x), for each document: what experts are given is made of all its tokens, a slot or
    more for each, and so is what a token is answered (Puigcerver et al., 2023, arXiv:2308.00951)."""

    sees_all = True
    routes = tokens_choose = False
    router_class = SoftRouter

    def evaluations(self, tokens):
        return len(self.router.phi)

    def forward(self, hidden_states: torch.Tensor, documents: torch.Tensor | None = None, **context) -> torch.Tensor:
        text = None if documents is None else find_documents(documents)
        rows, real = (hidden_states, None) if text is None else (text.unpack(hidden_states), text.real)
        dispatch, combine = self.router(rows, real)
        slots = dispatch.mT @ rows
        index = torch.arange(slots.shape[1], device=slots.device) * self.num_experts // slots.shape[1]
        index = index.repeat(slots.shape[0])[:, None]
        answers = self.experts(slots.flatten(0, 1), index, torch.ones_like(index, dtype=slots.dtype))
        output = combine @ answers.view_as(slots)
        return output if text is None else text.repack(output, *hidden_states.shape[:2])


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
SPARSE_FEED_FORWARDS = {
    "sparse": SparseFeedForward,
    "switch": SwitchFeedForward,
    "hierarchical": HierarchicalFeedForward,
    "expert_choice": ExpertChoiceFeedForward,
    "soft": SoftFeedForward,
}
