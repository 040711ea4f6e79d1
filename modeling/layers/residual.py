"""How the sub-layers of a layer join the stream: the one place that knows where the norms are.

A residual is called with the stream and the sub-layers in order (a mixer, perhaps a cross-attention, perhaps a
feed-forward) and answers with the stream. `enter` and `leave` are the two ends of the stack, for streams that are not
simply the hidden states.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init


class Residual(nn.Module):
    """What the wirings share: a norm per sub-layer, dropout of its answer, and a norm at the end of the stream."""

    final_norm = True

    def __init__(self, config, names: tuple[str, ...], norm: Callable[[], nn.Module]):
        super().__init__()
        self.norm = nn.ModuleDict({name: norm() for name in names})
        self.dropout = nn.Dropout(config.hidden_dropout) if config.hidden_dropout else unchanged

    @staticmethod
    def enter(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    @staticmethod
    def leave(stream: torch.Tensor) -> torch.Tensor:
        return stream

    def init_sublayers(self, sublayers: dict[str, nn.Module]) -> None:
        """Change the initial weights of the sub-layers, for wirings that ask for it."""

    def forward(self, stream: torch.Tensor, sublayers: dict[str, nn.Module], **context) -> torch.Tensor:
        raise NotImplementedError


def unchanged(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


class PreNorm(Residual):
    """x + f(norm(x))."""

    def forward(self, stream, sublayers, **context):
        for name, sublayer in sublayers.items():
            stream = stream + self.dropout(sublayer(self.norm[name](stream), **context))
        return stream


class WidePreNorm(PreNorm):
    """The same, on a stream in float32 at least, whatever the type of the weights: for norms that answer in that."""

    @staticmethod
    def enter(hidden_states):
        return hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))


class PostNorm(Residual):
    """norm(x + f(x)): the first Transformer, GPT-1, BERT."""

    final_norm = False

    def forward(self, stream, sublayers, **context):
        for name, sublayer in sublayers.items():
            stream = self.norm[name](stream + self.dropout(sublayer(stream, **context)))
        return stream


class Replaced(Residual):
    """f(x) takes the place of x: encoders on top of one another."""

    final_norm = False

    def __init__(self, config, names, norm):
        super().__init__(config, (), norm)

    def forward(self, stream, sublayers, **context):
        for sublayer in sublayers.values():
            stream = self.dropout(sublayer(stream, **context))
        return stream


class DeepNorm(Residual):
    """norm(alpha x + f(x)), alpha = (2 layers)^(1/4), with initial weights of f scaled by beta = (8 layers)^(-1/4)
    except those of queries and keys (Wang et al., 2022, arXiv:2203.00555, figure 2). These are of one stack; a config
    may say others in `deep_norm`, (alpha, beta)."""

    final_norm = False

    def __init__(self, config, names, norm):
        super().__init__(config, names, norm)
        of_one_stack = (2 * config.num_hidden_layers) ** 0.25, (8 * config.num_hidden_layers) ** -0.25
        self.alpha, self.beta = getattr(config, "deep_norm", of_one_stack)

    def init_sublayers(self, sublayers):
        for sublayer in sublayers.values():
            for name, module in sublayer.named_modules():
                if isinstance(module, nn.Linear):
                    init.xavier_normal_(module.weight, gain=1.0 if name in ("q_proj", "k_proj") else self.beta)

    def forward(self, stream, sublayers, **context):
        for name, sublayer in sublayers.items():
            stream = self.norm[name](self.alpha * stream + self.dropout(sublayer(stream, **context)))
        return stream


class Parallel(Residual):
    """x + sum of f(norm(x)), one norm for all: GPT-J, PaLM."""

    def __init__(self, config, names, norm):
        super().__init__(config, names[:1], norm)

    def forward(self, stream, sublayers, **context):
        (norm,) = self.norm.values()
        normed = norm(stream)
        return stream + sum(self.dropout(sublayer(normed, **context)) for sublayer in sublayers.values())
