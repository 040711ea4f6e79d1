"""What architectures have in common whose layers also see what they saw a segment ago (Dai et al., 2019,
arXiv:1901.02860)."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..layers.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from ..layers.cache import RecurrentCacheLayer
from ..layers.derived import Derived
from ..layers.mixer import Mixer
from ..layers.positions import NoPositions
from ..layers.residual import PostNorm, PreNorm
from ..ops.segment_attention import block_segment_attention, dense_segment_attention
from ..ops.segment_rows import Projected, SegmentState
from ..skeleton.backbone import Backbone
from ..skeleton.heads import CausalLM
from .configuration_segment_recurrence import SegmentRecurrenceConfig


class OpenPreNorm(PreNorm):
    """x + f(norm(x)), with no norm at the end of the stack."""

    final_norm = False


class QueryBiases(nn.Module):
    """u and v of the paper: what a query adds when it looks for content, and when it looks for a distance."""

    def __init__(self, config: SegmentRecurrenceConfig):
        super().__init__()
        self.content_bias = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.distance_bias = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))

    def init_parameters(self, std: float) -> None:
        init.normal_(self.content_bias, std=std)
        init.normal_(self.distance_bias, std=std)


class SharedBiases(NamedTuple):
    """The biases that all layers share, None where each has its own; the parameters themselves, so that checkpointed
    layers find them in backward."""

    content_bias: torch.Tensor | None
    distance_bias: torch.Tensor | None


class ScaledEmbedding(NoPositions):
    """sqrt(size) x."""

    def __init__(self, config: SegmentRecurrenceConfig):
        super().__init__(config)
        self.biases = None if config.untie_biases else QueryBiases(config)

    def forward(self, hidden_states, position_ids):
        shared = (None, None) if self.biases is None else (self.biases.content_bias, self.biases.distance_bias)
        return hidden_states * hidden_states.shape[-1] ** 0.5, SharedBiases(*shared)


class RelativeKeys(Derived):
    """A projection of [sin(d / 10000^(2i/size)), cos(...)] for every distance d that a token sees: the same for every
    text."""

    def __init__(self, config: SegmentRecurrenceConfig):
        super().__init__()
        self.span, self.num_heads = config.span, config.num_attention_heads
        self.farthest = config.clamp_length or self.span
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.r_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)

    def forward(self) -> torch.Tensor:
        """[span, heads, dim]."""
        return self.derive("keys", self.make)

    def make(self) -> torch.Tensor:
        weight = self.r_proj.weight
        size, wide = weight.shape[1], torch.promote_types(weight.dtype, torch.float32)
        distance = torch.arange(self.span, device=weight.device, dtype=wide).clamp(max=self.farthest)
        exponent = torch.arange(0, size, 2, device=weight.device, dtype=wide) / size
        angle = distance[:, None] * 10000**-exponent
        waves = torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :size].to(weight.dtype)
        return self.r_proj(self.dropout(waves)).unflatten(-1, (self.num_heads, -1))


class Reading(NamedTuple):
    """What a call of a mixer reads, and with what."""

    hidden_states: torch.Tensor
    biases: QueryBiases | SharedBiases
    told: dict  # documents, initial_state, output_final_state: as ops know them
    layer_idx: int
    memory: RecurrentCacheLayer | None

    @property
    def length(self) -> int:
        return self.hidden_states.shape[1]


class SegmentRecurrence(Mixer):
    """Relative attention over a token's segment and the memory before it."""

    state = SegmentState

    def __init__(self, config: SegmentRecurrenceConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_heads, self.window, self.attention_dropout = (
            config.num_attention_heads,
            config.window,
            config.attention_dropout,
        )
        width = config.num_attention_heads * config.head_dim
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, width, bias=config.attention_bias))
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.relative = RelativeKeys(config)
        self.biases = QueryBiases(config) if config.untie_biases else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: SharedBiases | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        memory = self.memory(past_key_values, layer_idx)
        state = None if memory is None else self.recall(memory)
        told = {"documents": attention_mask, "initial_state": state, "output_final_state": memory is not None}
        read = Reading(hidden_states, self.biases or position_embeddings, told, layer_idx, memory)
        output, state = self.attend(read, **kwargs)
        if memory is not None:
            memory.write(hidden_states.shape[1], **{f"memory_{name}": x for name, x in state._asdict().items()})
        return self.o_proj(output.flatten(-2))

    def attend(self, read: Reading, **kwargs) -> tuple[torch.Tensor, SegmentState | None]:
        return self.look(read, *self.projections(read))

    def look(
        self, read: Reading, query, key, value, still, zero=0.0, **told
    ) -> tuple[torch.Tensor, SegmentState | None]:
        """`zero`: a number that takes part for the sake of its gradient."""
        attend = block_segment_attention
        if read.length == 1:
            attend = dense_segment_attention
            if read.told["initial_state"] is not None:
                pair = ("memory_key", key), ("memory_value", value)
                told["live"] = tuple(read.memory.follow(*each) for each in pair)
        return attend(
            query + (read.biases.content_bias + zero),
            query + read.biases.distance_bias,
            key,
            value,
            self.relative(),
            self.window,
            still=still,
            dropout=self.attention_dropout if self.training else 0.0,
            **(read.told | told),
        )

    def projections(self, read: Reading) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Projected | None]:
        """Query, key, value, and what later segments see of keys and values where it is something else."""
        x, still = read.hidden_states, None
        query, key, value = (self.project(name, x) for name in ("q_proj", "k_proj", "v_proj"))
        if x.requires_grad and (read.length > self.window.segment or read.told["initial_state"] is not None):
            # What an earlier segment said trains the weights that look at it, but not the layers below
            still = tuple(self.project(name, x.detach()) for name in ("k_proj", "v_proj"))
        return query, key, value, still

    def project(self, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)(hidden_states).unflatten(-1, (self.num_heads, -1))

    def recall(self, memory) -> SegmentState | None:
        held = [memory.read(f"memory_{name}") for name in self.state._fields]
        return None if held[0] is None else self.state(*held)


class SegmentBackbone(Backbone):
    config: SegmentRecurrenceConfig
    positions = ScaledEmbedding
    norm_class = nn.LayerNorm

    def __init__(self, config: SegmentRecurrenceConfig):
        self.residual = {"post_norm": PostNorm, "pre_norm": OpenPreNorm}[config.residual_type]
        super().__init__(config)

    def make_embedding(self):
        return AdaptiveEmbedding(self.config) if self.config.adaptive else super().make_embedding()


class SegmentCausalLM(CausalLM):
    """A head that names the next token, of a vocabulary that may be cut."""

    def add_head(self, config):
        super().add_head(config)
        if not config.adaptive:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
            return
        self.lm_head = AdaptiveSoftmax(config)
        ties = config.tie_projections or [True] * len(self.lm_head.clusters)
        untied = {f"projections.{number}.weight" for number, tied in enumerate(ties) if not tied}
        self._tied_weights_keys = {
            f"lm_head.{name}": f"model.embed_tokens.{source}"
            for name, source in self.lm_head.tied.items()
            if name not in untied
        }
