"""Longformer (Beltagy et al., 2020, arXiv:2004.05150): windows, and a few tokens that see all and that all see.

A global token is seen by others through their own projections, and sees them through further ones, `q_global_proj` and
its like. Distances are counted in real tokens: nothing rests on how texts are padded or put together.
"""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs

from ...layers.attention import BidirectionalAttention
from ...layers.positions import LearnedPositions
from ...layers.record import weights_asked
from ...layers.residual import PostNorm
from ...layers.window_attention import CausalWindowAttention
from ...ops.band import Band, make_band, take
from ...ops.banded_attention import banded_attention, dense_weights
from ...ops.documents import first_of_documents
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import MultipleChoice, QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, MaskedLM, also_named
from ...skeleton.masks import number_documents
from .configuration_longformer import ArchLongformerConfig


class GlobalTokens(NamedTuple):
    """Which tokens see all. Rows with fewer than others are filled up with tokens that do not."""

    columns: torch.Tensor  # [batch, count]
    there: torch.Tensor  # [batch, count] whether a column is that of a global token
    mask: torch.Tensor | None  # [batch, 1, count, length] what they see, added to the scores; None: all


class WindowMask(NamedTuple):
    """What the layers are told in the place of a mask."""

    bands: dict[tuple[int, int], Band]  # by window and dilation
    everywhere: GlobalTokens | None


class WindowAttention(BidirectionalAttention):
    """Softmax attention to a window on both sides and to global tokens, which attend to all."""

    def __init__(self, config: ArchLongformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.band = band_of(config, layer_idx)
        for name in "qkv":
            size = getattr(self, f"{name}_proj").out_features
            projection = nn.Linear(config.hidden_size, size, bias=config.attention_bias)
            setattr(self, f"{name}_global_proj", projection)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: WindowMask,
        position_embeddings: tuple,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> torch.Tensor:
        band = attention_mask.bands[self.band]
        query, key, value = (self.heads(proj(hidden_states)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        output, weights = banded_attention(query, key, value, band, **self.block_options())
        asked = weights is not None and weights_asked(self.config, output_attentions)
        weights = dense_weights(weights, band) if asked else None
        return self.answer(*self.everywhere(hidden_states, output, weights, attention_mask.everywhere))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def everywhere(
        self, hidden_states: torch.Tensor, output: torch.Tensor, weights: torch.Tensor | None, told: GlobalTokens | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The answers with those of global tokens in their places. Where there are none, the projections read a token
        and add nothing of it, but get a gradient, which DistributedDataParallel waits for."""
        read = hidden_states if told is not None else hidden_states[:, :1]
        key, value = self.heads(self.k_global_proj(read)), self.heads(self.v_global_proj(read))
        asked = read if told is None else take(read, told.columns)
        query = self.heads(self.q_global_proj(asked))
        if told is None:
            return output + sum(x[:, :0].sum() for x in (query, key, value)), weights
        options = self.block_options()
        kernel, mask = options.pop("kernel"), None if told.mask is None else told.mask.to(query.dtype)
        answers, seen = kernel(*(x.transpose(1, 2) for x in (query, key, value)), mask, **options)
        output = put(output, answers.transpose(1, 2), told)
        if weights is not None:
            weights = put(weights.transpose(1, 2), seen.transpose(1, 2), told).transpose(1, 2)
        return output, weights


def put(x: torch.Tensor, answers: torch.Tensor, told: GlobalTokens) -> torch.Tensor:
    """x [batch, length, ...] with `answers` [batch, count, ...] at global tokens."""
    shape = (*told.there.shape, *(1,) * (x.ndim - 2))
    answers = torch.where(told.there.view(shape), answers, take(x, told.columns))
    return x.scatter(1, told.columns.view(shape).expand_as(answers), answers.to(x.dtype))


def band_of(config: ArchLongformerConfig, layer_idx: int) -> tuple[int, int]:
    return config.of_layer("attention_window", layer_idx), config.of_layer("attention_dilation", layer_idx)


def window_mask(
    config: ArchLongformerConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    global_attention_mask: torch.Tensor | None = None,
    global_tokens: int = 0,
    **kwargs,
) -> WindowMask:
    """Who sees whom, for layers of any window. `global_attention_mask` [batch, length]; without it, the first
    `global_tokens` of each document are global."""
    check_masks(inputs_embeds, attention_mask, global_attention_mask)
    documents = number_documents(config, inputs_embeds, attention_mask, position_ids=position_ids)
    length, most = inputs_embeds.shape[1], None
    if global_attention_mask is not None:
        everywhere = global_attention_mask > 0
        everywhere = everywhere if documents is None else everywhere & (documents > 0)
    elif documents is None:
        everywhere = (torch.arange(length, device=inputs_embeds.device) < global_tokens).expand(
            inputs_embeds.shape[0], -1
        )
        most = min(global_tokens, length)
    else:
        everywhere = first_of_documents(documents, global_tokens)
    told = find_global_tokens(everywhere, documents, inputs_embeds, most)
    marks = {"documents": documents, "landmarks": None if told is None else everywhere, "landmark_count": most}
    kinds = {band_of(config, layer_idx) for layer_idx in range(config.num_hidden_layers)}
    bands = {
        (window, dilation): make_band(inputs_embeds, window // 2, window // 2, dilation, **marks)
        for window, dilation in kinds
    }
    return WindowMask(bands, told)


def find_global_tokens(everywhere: torch.Tensor, documents, like: torch.Tensor, most: int | None):
    """`everywhere` [batch, length] bool as `GlobalTokens`; None where there is none."""
    counts = everywhere.sum(1)
    most = int(counts.max()) if most is None else most
    if most == 0:
        return None
    columns = everywhere.long().sort(dim=1, descending=True, stable=True).indices[:, :most]
    there, mask = torch.arange(most, device=like.device) < counts[:, None], None
    if documents is not None:
        hidden = documents.gather(1, columns)[:, :, None] != documents[:, None]
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)[:, None]
    return GlobalTokens(columns, there, mask)


def check_masks(inputs_embeds: torch.Tensor, attention_mask, global_attention_mask) -> None:
    for name, mask in (("attention_mask", attention_mask), ("global_attention_mask", global_attention_mask)):
        if mask is not None and mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(f"{name} is {list(mask.shape)}, but the tokens {list(inputs_embeds.shape[:2])}.")


def question_tokens(config: ArchLongformerConfig, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[batch, length] those before the first separator; of a row without one, the first."""
    ends = real & (input_ids == config.sep_token_id)
    first = first_of_documents(real.long(), max(1, config.num_global_tokens))
    return torch.where(ends.any(1, keepdim=True), real & (ends.cumsum(1) == 0), first)


def choice_tokens(config: ArchLongformerConfig, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[batch, length] those from the second after the first separator; of a row without one, the first."""
    ends = real & (input_ids == config.sep_token_id)
    first = first_of_documents(real.long(), max(1, config.num_global_tokens))
    return torch.where(ends.any(1, keepdim=True), real & ((real & (ends.cumsum(1) > 0)).cumsum(1) > 2), first)


class ArchLongformerModel(Backbone):
    config: ArchLongformerConfig
    residual = PostNorm
    positions = LearnedPositions
    norm_class = nn.LayerNorm
    mixers = {"window_attention": WindowAttention, "causal_window_attention": CausalWindowAttention}
    masks = {"window_attention": window_mask}

    def __init__(self, config: ArchLongformerConfig):
        super().__init__(config)
        self.global_tokens = config.num_global_tokens
        self.choose: Callable | None = None  # of a head that finds its global tokens in the text

    def ask_for_global_tokens(self, choose: Callable | None = None) -> None:
        """What a head's task asks for: one at the start of the text at least, or those that `choose` finds. Not of a
        decoder, in which only those at the start can be global."""
        if self.config.direction == "bidirectional":
            self.choose, self.global_tokens = choose, max(1, self.config.num_global_tokens)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        global_attention_mask: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """
        global_attention_mask (`torch.LongTensor` [batch, length], *optional*):
            1 at tokens that see all of their document, and that all of it see. By default the first
            `config.num_global_tokens`, and what the head's task asks for.
        """
        if global_attention_mask is not None and self.config.direction == "causal":
            raise ValueError("The global tokens of a decoder are its first: set num_global_tokens in the config.")
        if global_attention_mask is None and self.choose is not None and input_ids is not None:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            global_attention_mask = self.choose(self.config, input_ids, real > 0)
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        told |= {"global_attention_mask": global_attention_mask, "global_tokens": self.global_tokens}
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **told, **kwargs)


class ArchLongformerForCausalLM(CausalLM):
    config: ArchLongformerConfig
    backbone = ArchLongformerModel


class ArchLongformerForMaskedLM(MaskedLM):
    config: ArchLongformerConfig
    backbone = ArchLongformerModel
    forward = also_named(MaskedLM.forward, "global_attention_mask")


class ArchLongformerForSequenceClassification(SequenceClassification):
    config: ArchLongformerConfig
    backbone = ArchLongformerModel
    forward = also_named(SequenceClassification.forward, "global_attention_mask")

    def add_head(self, config):
        super().add_head(config)
        self.model.ask_for_global_tokens()


class ArchLongformerForTokenClassification(TokenClassification):
    config: ArchLongformerConfig
    backbone = ArchLongformerModel
    forward = also_named(TokenClassification.forward, "global_attention_mask")


class ArchLongformerForQuestionAnswering(QuestionAnswering):
    config: ArchLongformerConfig
    backbone = ArchLongformerModel
    forward = also_named(QuestionAnswering.forward, "global_attention_mask")

    def add_head(self, config):
        super().add_head(config)
        self.model.ask_for_global_tokens(question_tokens)


class ArchLongformerForMultipleChoice(MultipleChoice):
    config: ArchLongformerConfig
    backbone = ArchLongformerModel
    forward = also_named(MultipleChoice.forward, "global_attention_mask")

    def add_head(self, config):
        super().add_head(config)
        self.model.ask_for_global_tokens(choice_tokens)
