"""H-Net (Hwang et al., 2025, arXiv:2507.07955): a text is cut into chunks where neighbours differ, the cuts being
learnt with all else, and most layers see one item for each chunk.

Items are tokens (bytes) at the first level, and chunks of the level below at each further one. Each level is read by
recurrences, is cut, has the next level answer for the first item of each chunk, and goes on with the answers, smoothed.
"""

from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from ...layers.attention import Attention
from ...layers.level import Level, RowStates
from ...layers.norm import WideRMSNorm
from ...layers.positions import Plain, RotaryEmbedding, rotated
from ...layers.residual import WidePreNorm
from ...layers.window_attention import CausalWindowAttention
from ...ops.firing import Fired, last_of
from ...ops.precision import without_autocast
from ...ops.smoothing import chunk_smoothing, recurrent_smoothing
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, CausalLMOutput
from ...skeleton.hierarchy import Hierarchy, Resampling
from ...skeleton.hierarchy_config import AtLevel
from ...skeleton.loss import share_of_batch
from ...state_space.ssd.modeling_ssd import SSD
from .configuration_hnet import ArchHNetConfig

SURE = 1e-4  # rates of the smoothing keep this far from 0 and 1
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "down_proj")


class PartialRotation(NamedTuple):
    """cos and sin as of a `Rotation`, of the first numbers of each head; the others stay."""

    cos: torch.Tensor
    sin: torch.Tensor

    def rotate(self, query, key):
        dim = self.cos.shape[-1]
        turned = (rotated(x[..., :dim], self.cos, self.sin) for x in (query, key))
        return tuple(torch.cat((part, x[..., dim:]), dim=-1) for part, x in zip(turned, (query, key), strict=True))

    attend = Plain.attend


class PartialRotaryEmbedding(RotaryEmbedding):
    """RoPE of the first `config.rotary_dim` numbers of a head."""

    def __init__(self, config):
        super().__init__(AtLevel(config, head_dim=config.rotary_dim))

    def forward(self, hidden_states, position_ids):
        return hidden_states, PartialRotation(*self.turns(hidden_states, position_ids))


class BoundaryProbabilities(nn.Identity):
    """[rows, items] of one level, how likely a chunk begins with each item: 1 with the first of a document. Rows are
    documents, left-aligned; -1 past the end of one."""


class DynamicChunking(Resampling):
    """An item begins a chunk where it is unlike the one before it (section 2.2):

        p_t = (1 - cos(q_proj(x_(t-1)), k_proj(x_t))) / 2,   b_t = p_t > 1/2,   p_1 = 1.

    The next level works on the items with b_t, its answers are averaged over time with the rates p_t, and every item
    goes on with the average that its chunk began with and a projection of its own. Gradients reach p through the rates
    and through a factor 1 whose derivative is that of the probability of what was chosen, p_t or 1 - p_t.
    """

    def __init__(self, config: ArchHNetConfig, level: int):
        super().__init__(config, level)
        self.size, above = config.sizes[level : level + 2]
        self.q_proj = nn.Linear(self.size, self.size, bias=False)
        self.k_proj = nn.Linear(self.size, self.size, bias=False)
        self.residual_proj = nn.Linear(self.size, self.size)
        self.pad_dimension = nn.Parameter(torch.empty(above - self.size)) if above > self.size else None
        self.probabilities = BoundaryProbabilities()

    def init_parameters(self, std: float) -> None:
        """Items are compared as they are, and nothing passes beside the levels above."""
        for projection in (self.q_proj, self.k_proj):
            init.copy_(projection.weight, torch.eye(self.size))
        init.zeros_(self.residual_proj.weight)
        if self.pad_dimension is not None:
            init.zeros_(self.pad_dimension)

    def fire(self, stream, level: Level, kept: RowStates | None):
        """With what fires, the probability that it does, and that of what was chosen, both [rows, items]."""
        wide = torch.promote_types(stream.dtype, torch.float32)
        query, key = (F.normalize(proj(stream).to(wide), dim=-1) for proj in (self.q_proj, self.k_proj))
        held = None if kept is None else kept.read("query")
        before = torch.zeros_like(query[:, :1]) if held is None else held.to(wide)
        queries = torch.cat((before, query), dim=1)
        if kept is not None:
            kept.write(0, query=last_of(queries, 1, level.real))
        with without_autocast(stream):
            alike = (queries[:, :-1] * key).sum(-1)
        probability = ((1 - alike) / 2).clamp(0, 1).masked_fill(level.place == 0, 1.0)
        fires = self.decide(probability[..., None]).squeeze(-1)
        chosen = torch.where(fires, probability, 1 - probability)
        if level.real is None:
            self.probabilities(probability)
            return fires, (probability, chosen)
        self.probabilities(probability.masked_fill(~level.real, -1.0))
        return fires & level.real, (probability, chosen)

    def decide(self, probability: torch.Tensor) -> torch.Tensor:
        """[rows, items, 1] -> bool"""
        return probability > 0.5

    def shorten(self, stream, fired: Fired, told, level: Level, kept):
        """What begins a chunk stands for it, with the same further numbers for all where the next level is wider."""
        items = fired.rows.take(stream)
        if self.pad_dimension is None:
            return items
        return torch.cat((items, self.pad_dimension.to(items.dtype).expand(*items.shape[:-1], -1)), dim=-1)

    def expand(self, stream, answer, fired: Fired, told, level: Level, kept: RowStates | None):
        probability, chosen = told
        held = None if kept is None else kept.read("answer")
        made = None if answer is None else self.smooth(answer, fired, probability, level, held)
        used = fired.spread(made, held)
        if kept is not None:
            kept.write(0, answer=fired.last(made, held))
        through = chosen + (1 - chosen).detach()
        with without_autocast(stream):
            beside = self.residual_proj(stream.to(self.residual_proj.weight.dtype))
            return torch.addcmul(beside.to(used.dtype), used, through[..., None].to(used.dtype)).to(stream.dtype)

    def smooth(self, answer, fired: Fired, probability, level: Level, held: torch.Tensor | None) -> torch.Tensor:
        """[fired rows, fired items, size] in float32 at least; `held` is the last of what each row had before."""
        rate = fired.rows.take(probability).clamp(SURE, 1 - SURE)
        value = answer[..., : self.size].to(rate.dtype)
        documents = None if fired.rows.real is None else fired.rows.real.long()
        if held is None:
            return chunk_smoothing(value, rate, documents=documents)[0]
        held = held.masked_fill(level.place[:, :1] == 0, 0.0).index_select(0, fired.rows.batch_row)
        form = recurrent_smoothing if value.shape[1] == 1 else chunk_smoothing
        return form(value, rate, documents=documents, initial_state=held.to(rate.dtype))[0]


def recurrence(config: AtLevel, layer_idx: int) -> SSD:
    """An SSD layer as wide as its level."""
    return SSD(config.of_recurrence(config.hidden_size), layer_idx)


class ArchHNetModel(Hierarchy):
    config: ArchHNetConfig
    resampling = DynamicChunking
    positions = PartialRotaryEmbedding
    norm_class = WideRMSNorm
    residual = WidePreNorm
    part_norm = True
    mixers = {"ssd": recurrence, "ragged_attention": Attention, "causal_window_attention": CausalWindowAttention}
    _keep_in_fp32_modules_strict = ["residual_proj"]
    _can_record_outputs = Hierarchy._can_record_outputs | {
        "boundary_probabilities": OutputRecorder(BoundaryProbabilities, index=0)
    }

    def init_parameters(self, std: float) -> None:
        """Embeddings of variance 1; what is added to the stream is smaller, the more is added on the way to it."""
        init.normal_(self.embed_tokens.weight, std=1.0)
        levels = self.config.layer_levels
        for layer, level in zip(self.layers, levels, strict=True):
            added = sum(len(each.names) for each, at in zip(self.layers, levels, strict=True) if at <= level)
            for name, module in layer.named_modules():
                if name.endswith(OUTPUT_PROJECTIONS) and isinstance(module, nn.Linear):
                    init.normal_(module.weight, std=std / added**0.5)


def ratio_losses(
    boundary_probabilities: tuple[torch.Tensor, ...], target_ratios: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each document, the sum over stages of N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)) (section 2.3), where F is
    the share of items that begin a chunk, G their mean probability and N the target ratio: 1 for a stage where F = G =
    1 / N, which is its least where F is G. And how often a document counts: by its tokens that have one before them.

    The authors take the means over all documents of a batch: a loss that then rests on what comes together in one, and
    which pieces of a batch, or processes, do not add up to.
    """
    tokens = (boundary_probabilities[0] >= 0).sum(1)
    total = boundary_probabilities[0].new_zeros(len(tokens))
    for probability, ratio in zip(boundary_probabilities, target_ratios, strict=True):
        real = probability >= 0
        count = real.sum(1).clamp(min=1)
        fired = ((probability > 0.5) & real).sum(1) / count
        mean = (probability * real).sum(1) / count
        total = total + ratio / (ratio - 1) * ((ratio - 1) * fired * mean + (1 - fired) * (1 - mean))
    return total, (tokens - 1).clamp(min=0)


@dataclass
class HNetCausalLMOutput(CausalLMOutput):
    """`ratio_loss`: in training with labels, what keeps chunks as long as asked, the mean over tokens of what it is of
    their documents, added up over the stages. `boundary_probabilities`: where asked for, of each stage [rows, items],
    how likely a chunk begins with an item (more than 1/2: it does). Rows are documents, left-aligned, -1 past the end
    of one."""

    ratio_loss: torch.FloatTensor | None = None
    boundary_probabilities: tuple[torch.FloatTensor, ...] | None = None


class ArchHNetForCausalLM(CausalLM):
    config: ArchHNetConfig
    backbone = ArchHNetModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_boundary_probabilities: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HNetCausalLMOutput:
        """
        output_boundary_probabilities (`bool`, *optional*):
            Whether to answer with `boundary_probabilities`.
        """
        learning, found = self.training and labels is not None, {}
        told = {"labels": labels, "use_cache": use_cache, "return_dict": True} | kwargs
        if learning or output_boundary_probabilities:
            told |= {"output_boundary_probabilities": True, "found": found}
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = HNetCausalLMOutput(**super().forward(*given, **told))
        if output_boundary_probabilities:
            outputs.boundary_probabilities = found["boundary_probabilities"]
        if learning:
            outputs.ratio_loss = found["ratio_loss"].detach()
        return outputs

    def with_routing(self, loss, outputs, labels=None, found: dict | None = None, **kwargs):
        """Here the answer of the backbone is at hand: what is told of chunks goes into `found`."""
        loss, aux_loss = super().with_routing(loss, outputs, labels, **kwargs)
        if found is not None:
            found["boundary_probabilities"] = outputs["boundary_probabilities"]
        if found is not None and self.training and loss is not None:
            each, count = ratio_losses(outputs["boundary_probabilities"], self.config.target_ratios)
            found["ratio_loss"] = (each * count).sum() / count.sum().clamp(min=1)
            loss = loss + share_of_batch(labels, **kwargs) * self.config.ratio_loss_weight * found["ratio_loss"]
        return loss, aux_loss


class ArchHNetForSequenceClassification(SequenceClassification):
    config: ArchHNetConfig
    backbone = ArchHNetModel


class ArchHNetForTokenClassification(TokenClassification):
    config: ArchHNetConfig
    backbone = ArchHNetModel


class ArchHNetForQuestionAnswering(QuestionAnswering):
    config: ArchHNetConfig
    backbone = ArchHNetModel
