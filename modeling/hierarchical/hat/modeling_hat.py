"""HAT (Chalkidis et al., 2022, arXiv:2210.05529): layers inside segments, and layers across their first tokens.

The original cuts rows at fixed columns, so that padding and segments without a token take part. Here segments are of
real tokens: nothing rests on how texts are padded or put together, and what is not there costs nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import can_return_tuple

from ...layers.attention import BidirectionalAttention, CrossAttention
from ...layers.attention_pooling import AttentionPooling
from ...layers.gated_recurrence import BidirectionalGRU
from ...layers.levels import AskingMask, AskingView, LevelPositions, MemberMask, MemberView, NoLevelPositions
from ...layers.modalities import ModalityEmbedding
from ...layers.pixel_inputs import MODALITIES
from ...layers.residual import PostNorm, Replaced
from ...layers.segments import Segmentation, find_segments
from ...skeleton.backbone import Backbone
from ...skeleton.checks import check_inputs
from ...skeleton.classifiers import MultipleChoice, SequenceClassification, TokenClassification
from ...skeleton.heads import MaskedLM, also_named
from ...skeleton.masks import number_documents
from ..modeling_levels import SegmentedOutput, largest, with_embeddings
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
FURTHER = ("segment_starts", *MODALITIES.values())  # inputs, beside those of every head
LEVEL_POSITIONS = {"learned": LevelPositions, "none": NoLevelPositions}


class DialogueState(NamedTuple):
    """What was read of dialogues: the members of the last level, before its layers.

    members [dialogues, turns, size], left-aligned; real [dialogues, turns] whether there is one. A turn that is longer
    than a segment of the level below counts as several. settled [dialogues, size]: the largest of each number over
    segments of level 0 whose leader is no such member, which no later turn changes.
    """

    members: torch.Tensor
    real: torch.Tensor
    settled: torch.Tensor

    @classmethod
    def of_nothing(cls, like: torch.Tensor, dialogues: int) -> "DialogueState":
        """`like` [..., size]"""
        size, lowest = like.shape[-1], torch.finfo(like.dtype).min
        real = torch.zeros(dialogues, 0, dtype=torch.bool, device=like.device)
        return cls(like.new_zeros(dialogues, 0, size), real, like.new_full((dialogues, size), lowest))


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

    def add_parts(self, config):
        self.embed_modalities = ModalityEmbedding(config) if config.has_pixels else None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        segment_starts: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        **kwargs,
    ) -> SegmentedOutput:
        """
        position_ids (`torch.LongTensor` [batch, length], *optional*):
            Tell packed documents apart, by where they do not go on by one. Places are counted by the model.
        segment_starts (`torch.LongTensor` [batch, length], *optional*):
            At each token, how many levels begin a segment there, as the processor marks them: 0 none, 1 a segment of
            tokens, 2 also a segment of segments. A segment also starts where the one before is full.
        pixel_values (`torch.FloatTensor` [images, channels, height, width], *optional*):
            The images of the batch, in the order in which their placeholders stand.
        pixel_values_videos (`torch.FloatTensor` [videos, frames, channels, height, width], *optional*):
            So the videos; or, where these are of different lengths, [frames, channels, height, width] one after
            another. A frame is a segment of level 0; with three levels a video is one of level 1.
        """
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, None)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        text = self.segments_of(tokens, attention_mask, position_ids, segment_starts)
        told = self.with_pixels(text, input_ids, inputs_embeds, (pixel_values, pixel_values_videos))
        told |= {"token_type_ids": token_type_ids, "return_dict": True}
        outputs = super().forward(attention_mask=self.level_masks(text), position_ids=text.places, **told, **kwargs)
        return with_embeddings(self.config, outputs, text)

    def read_turn(
        self,
        state: DialogueState | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        segment_starts: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
    ) -> tuple[SegmentedOutput, DialogueState]:
        """Go on with dialogues [batch, length of the new turns]: what `forward` would say of the whole of them, of the
        tokens of the new turns, of all segments of the level below the last (`level_embeddings[:, -1]`; lower ones are
        those of the new turns) and of the dialogue (`pooler_output`); and the state to go on from.

        Levels below the last read the new turns alone, as they do in the whole dialogue: the last level reads all
        turns, which are few. It is the same only where no lower layer comes after those of the last level; ValueError
        else. A dialogue that has no new turn is masked out. Nothing of old turns is trained.
        """
        first = self.config.first_across
        if first is None:
            raise ValueError(
                "In this model lower levels read what the last one has understood, so that a new turn changes what old "
                f"ones mean: layer_types is {self.config.layer_types}. Put the layers of the last level at the end."
            )
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, None, None)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        check_segment_inputs(tokens, attention_mask, segment_starts)
        state = DialogueState.of_nothing(self.embed_tokens.weight, len(tokens)) if state is None else state
        text, masks = self.carried_on(tokens, attention_mask, segment_starts, state)
        seen = state.real.shape[1]
        told = self.with_pixels(text, input_ids, inputs_embeds, (pixel_values, pixel_values_videos), carried=seen)
        told |= {"token_type_ids": token_type_ids, "return_dict": True, "output_hidden_states": True}
        outputs = super().forward(attention_mask=masks, position_ids=text.places[:, seen:], **told)
        told = {"last_hidden_state": outputs.last_hidden_state[:, seen:], "hidden_states": None}
        found = with_embeddings(self.config, outputs, text, **told)
        members = text.members(self.config.num_levels - 1)
        settled = torch.maximum(state.settled, self.settled(outputs.last_hidden_state, text))
        if self.config.document_pooling == "max":
            found.pooler_output = torch.maximum(found.pooler_output, settled)
        read = members.unpack(outputs.hidden_states[first])
        return found, DialogueState(read.detach(), members.real, settled.detach())

    def with_pixels(self, text: Segmentation, input_ids, inputs_embeds, pixels: tuple, carried: int = 0) -> dict:
        """What the stack is told of tokens and pixels; `carried` columns of the text come before the tokens."""
        if self.embed_modalities is None:
            if any(images is not None for images in pixels):
                raise ValueError("This model reads text alone: its config has no image_token_id and no video_token_id.")
            return {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        kinds = nn.functional.pad(self.embed_modalities.kinds_of(tokens, self.embed_tokens.weight), (carried, 0))
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return {"inputs_embeds": self.embed_modalities(embeds, kinds, text.members(0), pixels)}

    def settled(self, hidden_states: torch.Tensor, text: Segmentation) -> torch.Tensor:
        """[documents, size] the largest over leaders of level 0 that are no members of the last level."""
        rows = text.leaders(0)
        inner = text.begins[0] & ~text.begins[-2]
        inner = torch.zeros(text.shape, dtype=torch.bool, device=inner.device).flatten().index_put((text.token,), inner)
        chosen = rows.unpack(inner.view(text.shape))
        return largest(rows.unpack(hidden_states), chosen if rows.real is None else chosen & rows.real)

    def carried_on(self, tokens, attention_mask, segment_starts, state: DialogueState) -> tuple[Segmentation, dict]:
        """The members that were read before in columns of their own, before those of the new turns."""
        batch, length = tokens.shape[:2]
        if len(state.members) != batch:
            raise ValueError(f"The state is of {len(state.members)} dialogues, the new turns are of {batch}.")
        real = torch.ones(batch, length, device=tokens.device) if attention_mask is None else attention_mask
        starts = torch.zeros_like(real, dtype=torch.long) if segment_starts is None else segment_starts
        begins = torch.arange(length, device=tokens.device) == real.bool().int().argmax(dim=1, keepdim=True)
        levels = self.config.num_levels
        starts = torch.cat(
            (torch.full_like(state.real, levels, dtype=torch.long), starts.where(~begins, levels)), dim=1
        )
        documents = torch.cat((state.real, real.bool()), dim=1).long()
        text = find_segments(documents, documents, starts, self.config.level_lengths, carried=state.real.shape[1])
        return text, self.level_masks(text) | {"carried": state.members}

    def begin(self, hidden_states, masks):
        carried = masks.get("carried")
        return hidden_states if carried is None else torch.cat((carried.to(hidden_states.dtype), hidden_states), dim=1)

    def segments_of(self, tokens, attention_mask=None, position_ids=None, segment_starts=None) -> Segmentation:
        """Whose members are whose in a batch `tokens` [batch, length, ...]; the rest as `forward` is told."""
        check_segment_inputs(tokens, attention_mask, segment_starts)
        documents = number_documents(self.config, tokens, attention_mask, position_ids=position_ids)
        return find_segments(tokens, documents, segment_starts, self.config.level_lengths)

    def level_masks(self, text: Segmentation) -> dict[str, MemberMask | AskingMask]:
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


def attending(model: ArchHatModel, text: Segmentation, level: int) -> MemberMask:
    members = text.members(level)
    return MemberMask(members, model.all_seen(members.real), level)


def reading(model: ArchHatModel, text: Segmentation, level: int) -> MemberMask:
    return MemberMask(text.members(level), None, level)


def pooled(model: ArchHatModel, text: Segmentation, level: int) -> AskingMask:
    members = text.members(level)
    return AskingMask(text.first(level), members, members.real)


def looking_up(model: ArchHatModel, text: Segmentation, level: int) -> AskingMask:
    asking, members = text.tokens(level), text.members(level)
    longest = asking.longest
    return AskingMask(asking, members, model.all_seen(members.real, longest))


TOLD: dict[str, Callable[[ArchHatModel, Segmentation, int], MemberMask | AskingMask]] = {
    "level": attending,
    "gru": reading,
    "pool": pooled,
    "down": looking_up,
}


def check_segment_inputs(tokens: torch.Tensor, attention_mask, segment_starts: torch.Tensor | None) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; HAT takes one number per token.")
    if segment_starts is not None and segment_starts.shape != tokens.shape[:2]:
        raise ValueError(f"segment_starts are {list(segment_starts.shape)}, but the tokens {list(tokens.shape[:2])}.")


class ArchHatForMaskedLM(MaskedLM):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(MaskedLM.forward, *FURTHER)


class ArchHatForSequenceClassification(SequenceClassification):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(SequenceClassification.forward, *FURTHER)


class ArchHatForTokenClassification(TokenClassification):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(TokenClassification.forward, *FURTHER)


class ArchHatForMultipleChoice(MultipleChoice):
    config: ArchHatConfig
    backbone = ArchHatModel
    of_batch = tuple(MODALITIES.values())
    forward = also_named(MultipleChoice.forward, *FURTHER)


class ArchHatForSegmentClassification(SegmentClassification):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(SegmentClassification.forward, *MODALITIES.values())


class ArchHatForPreTraining(SegmentPreTraining):
    config: ArchHatConfig
    backbone = ArchHatModel
    forward = also_named(SegmentPreTraining.forward, *MODALITIES.values())
