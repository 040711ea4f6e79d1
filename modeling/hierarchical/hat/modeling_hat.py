"""HAT (Chalkidis et al., 2022, arXiv:2210.05529): layers inside segments, and layers across their first tokens.

The original cuts rows at fixed columns, so that padding and segments without a token take part. Here segments are of
real tokens: nothing rests on how texts are padded or put together, and what is not there costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput
from transformers.utils import can_return_tuple

from ...layers.attention import BidirectionalAttention, CrossAttention
from ...layers.attention_pooling import AttentionPooling
from ...layers.gated_recurrence import BidirectionalGRU
from ...layers.levels import AskingMask, AskingView, LevelPositions, MemberMask, MemberView, NoLevelPositions
from ...layers.residual import PostNorm, Replaced
from ...layers.segments import Hierarchy, find_segments
from ...skeleton.backbone import Backbone
from ...skeleton.checks import check_inputs
from ...skeleton.classifiers import MultipleChoice, SequenceClassification, TokenClassification
from ...skeleton.heads import MaskedLM, also_named
from ...skeleton.masks import number_documents
from ..modeling_segments import SegmentClassification, SegmentPreTraining
from .configuration_hat import ArchHatConfig

LEVEL_MIXERS = {
    "level": BidirectionalAttention,
    "gru": BidirectionalGRU,
    "pool": AttentionPooling,
    "down": CrossAttention,
}
LEVEL_VIEWS = {"level": MemberView, "gru": MemberView, "pool": AskingView, "down": AskingView}

LEVEL_RESIDUALS = {"post_norm": PostNorm, "replaced": Replaced}
LEVEL_POSITIONS = {"learned": LevelPositions, "none": NoLevelPositions}


@dataclass
class SegmentedOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """
    pooler_output [documents, size]:
        What speaks for each document, by `config.document_pooling`. There is a document per row, unless rows are
        packed.
    segment_embeddings [documents, segments, size], segment_mask [documents, segments]:
        The leaders of level 0, zero past a document's last segment; 1 where there is one.
    level_embeddings [documents, levels, segments, size], level_masks [documents, levels, segments]:
        The same of every level but the last, from the lowest: those of sentences, of paragraphs, ...; with places for
        as many segments as level 0 has.
    router_logits, router_choices:
        Of sparse feed-forwards, over the members of their level; as in `CausalLMOutput`.
    """

    segment_embeddings: torch.FloatTensor | None = None
    segment_mask: torch.LongTensor | None = None
    level_embeddings: torch.FloatTensor | None = None
    level_masks: torch.LongTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_choices: tuple[torch.LongTensor, ...] | None = None


class ArchHatModel(Backbone):
    config: ArchHatConfig
    norm_class = nn.LayerNorm

    def __init__(self, config: ArchHatConfig):
        parts = {kind: config.part_and_level(kind)[0] for kind in config.layer_kinds}
        self.views = {kind: LEVEL_VIEWS[part] for kind, part in parts.items()}
        self.mixers = {kind: LEVEL_MIXERS[part] for kind, part in parts.items()}
        self.residual = LEVEL_RESIDUALS[config.residual_type]
        self.positions = LEVEL_POSITIONS[config.position_type]
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
        text = self.segments_of(tokens, attention_mask, position_ids, segment_starts)
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids, "return_dict": True}
        outputs = super().forward(input_ids, self.level_masks(text), text.places, **told, **kwargs)
        return with_embeddings(self.config, outputs, text)

    def segments_of(self, tokens, attention_mask=None, position_ids=None, segment_starts=None) -> Hierarchy:
        """Whose members are whose in a batch `tokens` [batch, length, ...]; the rest as `forward` is told."""
        check_segment_inputs(tokens, attention_mask, segment_starts)
        documents = number_documents(self.config, tokens, attention_mask, position_ids=position_ids)
        return find_segments(tokens, documents, segment_starts, self.config.level_lengths)

    def level_masks(self, text: Hierarchy) -> dict[str, MemberMask | AskingMask]:
        """What the layers of each type are told."""
        masks = {}
        for kind in self.kinds:
            part, level = self.config.part_and_level(kind)
            masks[kind] = TOLD[part](self, text, level)
        return masks

    def all_seen(self, real: torch.Tensor | None, asking: int | None = None) -> torch.Tensor | None:
        """The mask by which everyone sees all that is `real` [segments, longest]; `asking`: how many do, if others."""
        if real is None:
            return None
        like = torch.empty(*real.shape, 0, dtype=self.dtype, device=real.device)
        if asking is None:
            return create_bidirectional_mask(self.config, like, real)
        return create_bidirectional_mask(self.config, like[:, :1].expand(-1, asking, -1), real, like)


def attending(model: ArchHatModel, text: Hierarchy, level: int) -> MemberMask:
    members = text.members(level)
    return MemberMask(members, model.all_seen(members.real), level)


def reading(model: ArchHatModel, text: Hierarchy, level: int) -> MemberMask:
    return MemberMask(text.members(level), None, level)


def pooled(model: ArchHatModel, text: Hierarchy, level: int) -> AskingMask:
    members = text.members(level)
    return AskingMask(text.first(level), members, members.real)


def looking_up(model: ArchHatModel, text: Hierarchy, level: int) -> AskingMask:
    asking, members = text.tokens(level), text.members(level)
    longest = asking.longest
    return AskingMask(asking, members, model.all_seen(members.real, longest))


TOLD: dict[str, Callable[[ArchHatModel, Hierarchy, int], MemberMask | AskingMask]] = {
    "level": attending,
    "gru": reading,
    "pool": pooled,
    "down": looking_up,
}


def largest(found: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return found.masked_fill(~real[..., None], torch.finfo(found.dtype).min).amax(dim=1)


def leading(found: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return found[:, 0]


DOCUMENT_POOLS = {"max": largest, "leader": leading}


def with_embeddings(config: ArchHatConfig, outputs: ModelOutput, text: Hierarchy) -> SegmentedOutput:
    """What the layers answered, and what it says of segments and documents."""
    found, masks, most = [], [], text.leaders(0).longest
    for level in range(max(1, config.num_levels - 1)):
        leaders = text.leaders(level)
        rows, real = leaders.unpack(outputs.last_hidden_state), leaders.real
        real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device) if real is None else real
        missing = most - real.shape[1]
        found.append(nn.functional.pad(rows, (0, 0, 0, missing)))
        masks.append(nn.functional.pad(real, (0, missing)))
    return SegmentedOutput(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=DOCUMENT_POOLS[config.document_pooling](found[0], masks[0]),
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        cross_attentions=outputs.get("cross_attentions"),
        segment_embeddings=found[0],
        segment_mask=masks[0].long(),
        level_embeddings=torch.stack(found, dim=1),
        level_masks=torch.stack(masks, dim=1).long(),
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


class ArchHatForSegmentClassification(SegmentClassification):
    config: ArchHatConfig
    backbone = ArchHatModel


class ArchHatForPreTraining(SegmentPreTraining):
    config: ArchHatConfig
    backbone = ArchHatModel
