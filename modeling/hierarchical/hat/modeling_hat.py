"""HAT (Chalkidis et al., 2022, arXiv:2210.05529): layers inside segments, and layers across their first tokens.

The original cuts rows at fixed columns, so that padding and segments without a token take part. Here segments are of
real tokens: nothing rests on how texts are padded or put together, and what is not there costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput
from transformers.utils import can_return_tuple

from ...layers.attention import BidirectionalAttention
from ...layers.positions import NoPositions, Plain
from ...layers.residual import PostNorm
from ...layers.segments import find_segments
from ...layers.view import View
from ...ops.documents import EvenlyUnpacked, Unpacked
from ...skeleton.backbone import Backbone
from ...skeleton.checks import check_inputs
from ...skeleton.classifiers import MultipleChoice, SequenceClassification, TokenClassification
from ...skeleton.heads import MaskedLM, also_named
from ...skeleton.masks import number_documents
from .configuration_hat import ArchHatConfig


class LevelMask(NamedTuple):
    """What the layers of a level are told in the place of a mask: whose members are whose, and the mask in segments."""

    segments: Unpacked | EvenlyUnpacked
    mask: torch.Tensor | None


class LevelTables(NamedTuple):
    """A vector per place in a segment, of each level: parameters, so that checkpointed layers find them in backward."""

    tables: tuple[torch.Tensor, ...]

    rotate = Plain.rotate
    attend = Plain.attend


class LevelPositions(NoPositions):
    """x + a learned vector per place in the segment of level 0; layers of other levels add theirs to the leaders."""

    def __init__(self, config: ArchHatConfig):
        super().__init__(config)
        self.levels = nn.ModuleList(nn.Embedding(length, config.hidden_size) for length in config.level_lengths)

    def forward(self, hidden_states, position_ids):
        return hidden_states + self.levels[0](position_ids), LevelTables(tuple(level.weight for level in self.levels))


class SegmentView(View):
    """A layer sees each segment of tokens as a text of its own: [segments, longest, size]."""

    def forward(
        self, stream: torch.Tensor, inside: Callable[..., torch.Tensor], attention_mask: LevelMask, **context
    ) -> torch.Tensor:
        segments = attention_mask.segments
        context |= {"attention_mask": attention_mask.mask, "documents": segments.real}
        return segments.repack_into(stream, inside(segments.unpack(stream), **context))


class LeaderView(SegmentView):
    """A layer sees the leaders of the segments below, with the vector of their place. Other tokens pass it by."""

    def __init__(self, config: ArchHatConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.level = config.layer_kinds.index(config.layer_types[layer_idx])

    def forward(self, stream, inside, attention_mask, position_embeddings, **context):
        def placed(rows: torch.Tensor, **told) -> torch.Tensor:
            return inside(rows + position_embeddings.tables[self.level][: rows.shape[1]], **told)

        return super().forward(stream, placed, attention_mask, position_embeddings=position_embeddings, **context)


@dataclass
class SegmentedOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """
    pooler_output [documents, size]:
        The largest of each number over a document's segments. There is a document per row, unless rows are packed.
    segment_embeddings [documents, segments, size], segment_mask [documents, segments]:
        The leaders of level 0, zero past a document's last segment; 1 where there is one.
    router_logits, router_choices:
        Of sparse feed-forwards, over the members of their level; as in `CausalLMOutput`.
    """

    segment_embeddings: torch.FloatTensor | None = None
    segment_mask: torch.LongTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_choices: tuple[torch.LongTensor, ...] | None = None


class ArchHatModel(Backbone):
    config: ArchHatConfig
    residual = PostNorm
    positions = LevelPositions
    norm_class = nn.LayerNorm

    def __init__(self, config: ArchHatConfig):
        first, *others = config.layer_kinds
        self.views = {first: SegmentView} | dict.fromkeys(others, LeaderView)
        self.mixers = dict.fromkeys(config.layer_kinds, BidirectionalAttention)
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        segment_starts: torch.LongTensor | None = None,
        **kwargs,
    ) -> SegmentedOutput:
        """
        position_ids (`torch.LongTensor` [batch, length], *optional*):
            Tell packed documents apart, by where they do not go on by one. Places are counted by the model.
        segment_starts (`torch.LongTensor` [batch, length], *optional*):
            At each token, how many levels begin a segment there, as the processor marks them: 0 none, 1 a segment of
            tokens, 2 also a segment of segments. A segment also starts where the one before is full.
        """
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, None)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        check_segment_inputs(tokens, attention_mask, segment_starts)
        documents = number_documents(self.config, tokens, attention_mask, position_ids=position_ids)
        text = find_segments(tokens, documents, segment_starts, self.config.level_lengths)
        masks = {kind: self.mask_of(level) for kind, level in zip(self.config.layer_kinds, text.levels, strict=True)}
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids, "return_dict": True}
        outputs = super().forward(input_ids, masks, text.places, **told, **kwargs)
        return with_embeddings(outputs, text.leaders)

    def mask_of(self, segments: Unpacked | EvenlyUnpacked) -> LevelMask:
        """Every real member of a segment sees every other."""
        real = segments.real
        if real is None:
            return LevelMask(segments, None)
        like = torch.empty(*real.shape, 0, dtype=self.dtype, device=real.device)
        return LevelMask(segments, create_bidirectional_mask(self.config, like, real))


def with_embeddings(outputs: ModelOutput, leaders: Unpacked | EvenlyUnpacked) -> SegmentedOutput:
    """What the layers answered, and what it says of segments and documents."""
    found, real = leaders.unpack(outputs.last_hidden_state), leaders.real
    if real is None:
        real = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
    return SegmentedOutput(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=found.masked_fill(~real[..., None], torch.finfo(found.dtype).min).amax(dim=1),
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        segment_embeddings=found,
        segment_mask=real.long(),
        router_logits=outputs.get("router_logits"),
        router_choices=outputs.get("router_choices"),
    )


def check_segment_inputs(tokens: torch.Tensor, attention_mask, segment_starts: torch.Tensor | None) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; HAT takes one number per token.")
    if segment_starts is not None and segment_starts.shape != tokens.shape[:2]:
        raise ValueError(f"segment_starts are {list(segment_starts.shape)}, but the tokens {list(tokens.shape[:2])}.")


class ArchHatForMaskedLM(MaskedLM):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(MaskedLM.forward, "segment_starts")


class ArchHatForSequenceClassification(SequenceClassification):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(SequenceClassification.forward, "segment_starts")


class ArchHatForTokenClassification(TokenClassification):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(TokenClassification.forward, "segment_starts")


class ArchHatForMultipleChoice(MultipleChoice):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(MultipleChoice.forward, "segment_starts")
