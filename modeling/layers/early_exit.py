"""Layers that a token leaves the stack between, once it is sure: depth-adaptive Transformers (Elbayad et al., 2020,
arXiv:1910.10073) as decoded by CALM (Schuster et al., 2022, arXiv:2207.07061)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.import_utils import is_tracing

from ..ops.token_choice import ChosenRows, rows_of
from .attention import Attention
from .residual import PreNorm
from .side_loss import LateLoss
from .view import View


class Exits:
    """What the layers of one call tell each other, and the head: which tokens [batch, length] are still in the stack
    (None: all), and how many layers of those that they may leave each has been through. In training all stay, and what
    is said of them goes into `loss`, and each layer's answer into `answers`."""

    def __init__(self, loss: LateLoss | None = None):
        self.staying: torch.Tensor | None = None
        self.depths: torch.Tensor | int = 0
        self.answers: dict[int, torch.Tensor] = {}
        self.loss = loss


class CarryingPreNorm(PreNorm):
    """x + f(norm(x)) of the tokens that are `asking`; of the others the mixer is told norm(x) all the same."""

    def forward(self, stream, sublayers, asking: ChosenRows | None = None, **context):
        if asking is None:
            return super().forward(stream, sublayers, **context)
        (name, mixer), *others = sublayers.items()
        answer = mixer(self.norm[name](stream), asking=asking, **context)
        rows = asking.take(stream)
        return rows if answer is None else super().forward(rows + self.dropout(answer), dict(others), **context)


class CarryingAttention(Attention):
    """Attention to all by those that are `asking`, whose answer is theirs alone: rows, or None if there is no one."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        layer_idx: int = 0,
        asking: ChosenRows | None = None,
        **kwargs,
    ):
        if asking is None:
            told = (hidden_states, attention_mask, position_embeddings, past_key_values, layer_idx)
            return super().forward(*told, **kwargs)
        key, value = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        key, value = position_embeddings.rotate(key, key)[1].transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, layer_idx)
        if asking.nothing:
            return None
        query = self.q_proj(asking.take(hidden_states)).unflatten(-1, (-1, self.head_dim))
        told = type(position_embeddings)(*(asking.take(each) for each in position_embeddings))
        query = told.rotate(query, query)[0].transpose(1, 2)
        mask = self.mask_of(asking, attention_mask, key.shape[2])
        if len(asking.batch_row) < len(key):
            key, value = key[asking.batch_row], value[asking.batch_row]
        return self.answer(*self.attend(query, key, value, mask))

    @staticmethod
    def mask_of(asking: ChosenRows, attention_mask: torch.Tensor | None, keys: int) -> torch.Tensor:
        """[rows, 1, longest, keys]; where there is no mask, the last keys are those of the tokens."""
        if attention_mask is not None:
            return asking.take(attention_mask[:, 0])[:, None]
        place = asking.index % asking.length + keys - asking.length
        return (torch.arange(keys, device=place.device) <= place[..., None])[:, None]


class EarlyExitView(View):
    """A layer for the tokens that are still in the stack. Those that have left stay as they were, and later tokens see
    keys and values that are made of that (CALM, section 3.1).

    A token leaves after this layer where its confidence is over `config.early_exit_threshold`: by `"classifier"`,
    sigmoid(gate(y)) of the layer's answer y, which learns by a `LateLoss` whether the last layer would name the same
    token (section 4.3); by `"saturation"`, the cosine of y and what the layer was given (section 3.5).
    """

    unquantized = ("gate",)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.threshold, self.is_last = config.early_exit_threshold, layer_idx == config.num_hidden_layers - 1
        if config.exit_confidence == "classifier" and not self.is_last:
            self.gate = nn.Linear(config.hidden_size, 1)
        self.by_classifier = config.exit_confidence == "classifier"

    def forward(self, stream, inside, exits: Exits | None = None, past_key_values=None, layer_idx: int = 0, **context):
        context |= {"past_key_values": past_key_values, "layer_idx": layer_idx}
        if self.training:
            return self.learn(inside(stream, **context), exits, layer_idx)
        fixed = past_key_values is not None and past_key_values.is_compileable
        if exits.staying is None or is_tracing(stream) or fixed:
            answer = inside(stream, **context)
            return self.note(stream, answer, exits)
        rows = rows_of(exits.staying)
        if rows.nothing and past_key_values is None:
            return stream
        answer = inside(stream, asking=rows, **context | {"documents": rows.real})
        if rows.nothing:
            return stream
        exits.depths = exits.depths + exits.staying
        if not self.is_last:
            exits.staying = rows.put(exits.staying, self.stay(rows.take(stream), answer))
        return rows.put(stream, answer)

    def note(self, stream: torch.Tensor, answer: torch.Tensor, exits: Exits) -> torch.Tensor:
        """The stream after a layer that worked on all tokens, also those that had left."""
        staying = torch.ones_like(stream[..., 0], dtype=torch.bool) if exits.staying is None else exits.staying
        exits.depths = exits.depths + staying
        if exits.staying is not None:
            answer = torch.where(staying[..., None], answer, stream)
        if not self.is_last:
            exits.staying = staying & self.stay(stream, answer)
        return answer

    def stay(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, size] before and after the layer -> [rows, tokens], whether a token goes on."""
        confidence = torch.sigmoid(self.gate(after)) if self.by_classifier else self.likeness(before, after)
        return ~self.decide(confidence).squeeze(-1)

    def likeness(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(before, after, dim=-1)[..., None]

    def decide(self, confidence: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, 1] -> bool, whether a token leaves."""
        return confidence > self.threshold

    def learn(self, answer: torch.Tensor, exits: Exits | None, layer_idx: int) -> torch.Tensor:
        """The answer, with a zero that carries the gradient of the classifier."""
        if self.is_last or not self.by_classifier:
            return answer
        if exits is None:  # DistributedDataParallel waits for it all the same
            return answer + self.gate(answer[:, :0].detach()).sum()
        return answer + exits.loss.attach(layer_idx, self.gate(answer.detach()))
