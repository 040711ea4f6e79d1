"""Reversible residuals (Gomez et al., 2017, arXiv:1707.04585; Reformer: Kitaev et al., 2020, arXiv:2001.04451).

The stream is two, side by side. In training, forward keeps only its end; backward makes each stream, and what a
sub-layer computed, anew from the stream behind it, so that memory does not grow with the depth. Choices that a
rounding error could turn (buckets) are kept.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .record import HiddenStates
from .residual import Residual

KEPT_LAYERS = 2  # the last ones, of which backward asks first

Streams = tuple[torch.Tensor, torch.Tensor]


class Reversible(Residual):
    """(a, b) -> (b, a + f(norm(b))), for each sub-layer; the norm at the end is of both."""

    def __init__(self, config, names, norm):
        super().__init__(config, names, norm)
        self.recorded = HiddenStates()
        self.first_kept = config.num_hidden_layers - KEPT_LAYERS

    @staticmethod
    def enter(hidden_states):
        """At least float32: what is subtracted again must be what was added."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return torch.cat((wide, wide), dim=-1)

    def forward(self, stream, sublayers, **context):
        recomputed = (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and context.get("past_key_values") is None  # a cache must not be written twice
            and context["layer_idx"] < self.first_kept
        )
        streams, mark = stream.chunk(2, dim=-1), getattr(stream, "mark", None)
        before = streams[1]
        for name, sublayer in sublayers.items():
            branch = Branch(self.norm[name], sublayer, self.dropout, context)
            if recomputed:
                streams, mark = couple_and_forget(streams, branch, mark or Mark())
            else:
                streams = streams[1], streams[0] + branch(streams[1])
        stream = torch.cat((streams[0], self.recorded(before, streams[1])), dim=-1)
        if recomputed:
            stream.mark = mark
        return stream


class Choices:
    """What a sub-layer chose in forward, told again when backward computes it anew."""

    def __init__(self):
        self.made: torch.Tensor | None = None

    def first(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What was made at the first call."""
        if self.made is None:
            self.made = make()
        return self.made


class Branch:
    """dropout(f(norm(x))), in the type of the weights."""

    def __init__(self, norm: nn.Module, sublayer: nn.Module, dropout: nn.Module, context: dict):
        self.norm, self.sublayer, self.dropout = norm, sublayer, dropout
        self.context = context | {"choices": Choices()}

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states.to(self.norm.weight.dtype))
        return self.dropout(self.sublayer(normed, **self.context))


class Mark:
    """The streams at one place: kept at the end of the stack, and while backward passes there."""

    streams: Streams | None = None


def couple_and_forget(streams: Streams, branch: Branch, before: Mark) -> tuple[Streams, Mark]:
    """The streams behind a branch, and their mark. What the branch computes, and the streams before it, are forgotten
    until backward comes there."""
    first, second = streams
    coupling = Coupling(branch, second, before)
    with set_checkpoint_early_stop(False):  # the recomputation must reach its end: it is what the inversion needs
        added = checkpoint(coupling, use_reentrant=False)
    streams = second, first + added
    coupling.behind.streams, before.streams = tuple(x.detach() for x in streams), None
    return streams, coupling.behind


class Coupling:
    """A branch. Called first in forward; then in backward, when it also finds the streams before it."""

    def __init__(self, branch: Branch, live: torch.Tensor, before: Mark):
        self.branch, self.live, self.needs_grad = branch, live, live.requires_grad
        self.before, self.behind = before, Mark()

    def __call__(self) -> torch.Tensor:
        if self.live is not None:
            live, self.live = self.live, None
            return self.branch(live)
        if self.behind.streams is None:
            raise RuntimeError("Reversible layers go back once: their streams are forgotten. Run forward again.")
        second, sum_ = self.behind.streams
        added = self.branch(second.detach().requires_grad_(self.needs_grad))
        self.before.streams, self.behind.streams = (sum_ - added.detach(), second), None
        return added
