"""BigBird (Zaheer et al., 2020, arXiv:2007.14062): a block of tokens sees a window of blocks, some that all see, and
some at random. Blocks are counted in real tokens of a document: nothing rests on how texts are padded or put together.
"""

from typing import NamedTuple, Unpack

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, can_return_tuple

from ...layers.attention import Attention
from ...layers.positions import LearnedPositions
from ...layers.record import weights_asked
from ...layers.residual import PostNorm
from ...ops.block_sparse_attention import BlockPattern, block_sparse_attention, cut_into_blocks, dense_block_weights
from ...ops.documents import document_numbers
from ...skeleton.backbone import Backbone
from ...skeleton.checks import check_inputs
from ...skeleton.classifiers import MultipleChoice, QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, MaskedLM
from ...skeleton.masks import count_positions, number_documents
from .configuration_bigbird import ArchBigBirdConfig


class BlockMask(NamedTuple):
    """What layers are told in the place of a mask, where there are several tokens."""

    patterns: tuple[BlockPattern, ...]  # by layer, over the columns before these tokens, these, and those after
    before: int


class StepMask(NamedTuple):
    """The same for one token with others before it: which columns of a cache it reads."""

    columns: torch.Tensor  # [layers, batch, keys]
    hidden: torch.Tensor  # [layers, batch, keys] those that are not there


class BlockSparseAttention(Attention):
    """Softmax attention to the tokens of a few blocks."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: BlockMask | StepMask,
        position_embeddings: tuple,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> torch.Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        held = key, value
        if past_key_values is not None:
            held = past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), layer_idx)
            held = tuple(x.transpose(1, 2) for x in held)
        asked = weights_asked(self.config, output_attentions)
        if isinstance(attention_mask, StepMask):
            return self.answer(*self.step(query, *held, attention_mask, layer_idx, asked))
        pattern, before = attention_mask.patterns[layer_idx], attention_mask.before
        if before == 0:
            return self.answer(*self.see(query, key, value, pattern, asked))
        new = slice(before, before + query.shape[1])
        query = F.pad(query, (0, 0, 0, 0, before, held[0].shape[1] - new.stop))
        output, weights = self.see(query, *held, pattern, asked)
        return self.answer(output[:, new], None if weights is None else weights[:, :, new])

    def see(self, query, key, value, pattern: BlockPattern, asked: bool):
        """([batch, length, heads, dim], weights [batch, heads, length, length] where they are asked for, or None)."""
        output, weights = block_sparse_attention(query, key, value, pattern, **self.block_options())
        return output, dense_block_weights(weights, pattern) if asked and weights else None

    def step(self, query, key, value, told: StepMask, layer_idx: int, asked: bool):
        """The same of one token; of the keys and values [batch, columns, heads, dim] only those seen are read."""
        columns, hidden = told.columns[layer_idx], told.hidden[layer_idx]
        row, length = torch.arange(columns.shape[0], device=columns.device)[:, None], key.shape[1]
        key, value = (x[row, columns].transpose(1, 2) for x in (key, value))
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
        options = self.block_options()
        kernel = options.pop("kernel")
        output, weights = kernel(query.transpose(1, 2), key, value, mask[:, None, None], **options)
        if asked and weights is not None:
            index = columns[:, None, None].expand_as(weights)
            weights = weights.new_zeros(*weights.shape[:3], length).scatter_add(3, index, weights)
        return output.transpose(1, 2), weights if asked else None


def block_mask(
    config: ArchBigBirdConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    position_ids: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    ahead: int = 0,
    layer_idx: int = 0,
    **kwargs,
) -> BlockMask | StepMask:
    """Who sees whom, in each layer. `ahead` columns are tokens ahead of the texts of `documents` [batch, length], by
    default those that the other arguments tell of."""
    before = 0 if past_key_values is None else past_key_values.get_seq_length(layer_idx)
    length = inputs_embeds.shape[1]
    if past_key_values is not None and (length == 1 or before > 0):
        columns, _ = past_key_values.get_mask_sizes(length, layer_idx)
        real = real_columns(inputs_embeds, attention_mask, before, columns)
        if length == 1:
            return step_mask(config, real, padded=attention_mask is not None)
        return going_on(config, real.long(), int(before))
    if documents is None:
        attention_mask = None if attention_mask is None else attention_mask[:, :length]
        told = {"past_key_values": past_key_values, "position_ids": position_ids}
        documents = number_documents(config, inputs_embeds, attention_mask, **told)
    blocks = cut_into_blocks(inputs_embeds, documents, config.block_size, ahead)
    return in_layers(config, lambda layer: config.block_choice.pattern(blocks, layer), 0)


def in_layers(config: ArchBigBirdConfig, make, before: int) -> BlockMask:
    return BlockMask(tuple(make(layer) for layer in range(config.num_hidden_layers)), before)


def real_columns(inputs_embeds, attention_mask, before: int | torch.Tensor, columns: int) -> torch.Tensor:
    """[batch, columns] bool, of a cache with room for `columns`."""
    batch, length = inputs_embeds.shape[:2]
    if attention_mask is not None:
        return F.pad(attention_mask.bool(), (0, columns - attention_mask.shape[1]))
    return (torch.arange(columns, device=inputs_embeds.device) < before + length).expand(batch, -1)


def going_on(config: ArchBigBirdConfig, documents: torch.Tensor, before: int) -> BlockMask:
    """Only the blocks that hold new tokens ask."""
    blocks = cut_into_blocks(documents, documents, config.block_size)
    new = torch.arange(documents.shape[1], device=documents.device).expand_as(documents) >= before
    asked = blocks.cut.unpack(new).any(1).nonzero().squeeze(-1)
    return in_layers(config, lambda layer: config.block_choice.pattern(blocks, layer, asked), before)


def step_mask(config: ArchBigBirdConfig, real: torch.Tensor, padded: bool) -> StepMask:
    """What the last of the real columns [batch, columns] sees."""
    choice, size = config.block_choice, config.block_size
    place = (real.sum(1) - 1).clamp(min=0)
    longest = -(-real.shape[1] // size)
    block = place // size
    told = (block, block + 1, longest)
    seen = torch.stack([choice.seen(*told, layer) for layer in range(config.num_hidden_layers)])
    slot = torch.arange(size, device=real.device)
    rank = (seen[..., None] * size + slot).flatten(2)  # among the real columns
    hidden = (rank < 0) | (rank > place[:, None])
    columns = rank.clamp(min=0)
    if padded:  # the column of each rank is the first with as many real ones up to it
        upto = real.cumsum(1).expand(seen.shape[0], -1, -1)
        columns = torch.searchsorted(upto.contiguous(), columns + 1)
    return StepMask(columns.clamp(max=real.shape[1] - 1), hidden)


class TextPositions(LearnedPositions):
    """The same for tokens of the text; those ahead of it, at position -1, are told apart by embeddings of their own."""

    def __init__(self, config: ArchBigBirdConfig):
        super().__init__(config)
        if config.num_extra_global_tokens:
            self.embed_global_tokens = nn.Embedding(config.num_extra_global_tokens, config.hidden_size)

    def forward(self, hidden_states, position_ids):
        placed, told = super().forward(hidden_states, position_ids.clamp(min=0))
        return torch.where(position_ids[..., None] < 0, hidden_states, placed), told


class ArchBigBirdModel(Backbone):
    config: ArchBigBirdConfig
    residual = PostNorm
    positions = TextPositions
    norm_class = nn.LayerNorm
    mixers = dict.fromkeys(ArchBigBirdConfig.layer_kinds, BlockSparseAttention)
    masks = dict.fromkeys(mixers, block_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """The global tokens of extended transformer construction go through the layers ahead of the text, and are not
        among the hidden states that the model answers with."""
        if not self.config.num_extra_global_tokens:
            told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
            return super().forward(input_ids, attention_mask, position_ids, past_key_values, **told, **kwargs)
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        extended = self.extend(text, attention_mask, position_ids, token_type_ids)
        outputs = super().forward(**extended, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, extended["ahead"] :]
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(x[:, extended["ahead"] :] for x in outputs.hidden_states)
        return outputs

    def make_masks(self, inputs_embeds, attention_mask, past_key_values, position_ids, **context):
        """What generate() hands over ready, tells which columns of a cache are real."""
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask[self.config.layer_types[0]]
        return super().make_masks(inputs_embeds, attention_mask, past_key_values, position_ids, **context)

    def extend(self, text: torch.Tensor, attention_mask, position_ids, token_type_ids) -> dict:
        """The inputs with each document's global tokens, at position -1, ahead of `text` [batch, length, size]."""
        documents = number_documents(self.config, text, attention_mask, position_ids=position_ids)
        documents = document_numbers(documents, text)
        if position_ids is None:
            position_ids = count_positions(text, attention_mask)
        count, most = self.config.num_extra_global_tokens, int(documents.amax())
        owner = torch.arange(1, most + 1, device=text.device).repeat_interleave(count).expand(len(text), -1)
        owner = owner * (owner <= documents.amax(1, keepdim=True))
        documents = torch.cat((owner, documents), dim=1)
        embeds = self.embed_positions.embed_global_tokens.weight.repeat(most, 1).to(text.dtype)
        ahead, types = owner.shape[1], token_type_ids
        return {
            "inputs_embeds": torch.cat((embeds.expand(len(text), -1, -1), text), dim=1),
            "attention_mask": (documents > 0).long(),
            "position_ids": F.pad(position_ids.expand(len(text), -1), (ahead, 0), value=-1),
            "token_type_ids": None if types is None else F.pad(types, (ahead, 0)),
            "documents": documents,
            "ahead": ahead,
        }


class ArchBigBirdForCausalLM(CausalLM):
    config: ArchBigBirdConfig
    backbone = ArchBigBirdModel

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """generate() wants tensors: which columns of the static cache hold, or will now hold, real tokens."""
        length = inputs_embeds.shape[1]
        before, (columns, _) = past_key_values.get_seq_length(), past_key_values.get_mask_sizes(length, 0)
        real = real_columns(inputs_embeds, attention_mask, before, columns)
        return dict.fromkeys(self.config.layer_types, real)


class ArchBigBirdForMaskedLM(MaskedLM):
    config: ArchBigBirdConfig
    backbone = ArchBigBirdModel


class ArchBigBirdForSequenceClassification(SequenceClassification):
    config: ArchBigBirdConfig
    backbone = ArchBigBirdModel


class ArchBigBirdForTokenClassification(TokenClassification):
    config: ArchBigBirdConfig
    backbone = ArchBigBirdModel


class ArchBigBirdForQuestionAnswering(QuestionAnswering):
    config: ArchBigBirdConfig
    backbone = ArchBigBirdModel


class ArchBigBirdForMultipleChoice(MultipleChoice):
    config: ArchBigBirdConfig
    backbone = ArchBigBirdModel
