"""Layers whose tokens see others by a pattern of their places: strided, fixed and dilated attention."""

from typing import NamedTuple

import torch

from ..ops.attention_kernels import fused, written_out
from ..ops.dilated_attention import dilated_attention, times_shown
from ..ops.factorized_attention import fixed_attention, sees_fixed, sees_strided, strided_attention
from .attention import Attention


class WholeTexts(NamedTuple):
    """In the place of a mask: texts from their beginning, of which nothing is cached."""

    documents: torch.Tensor | None  # [batch, length] as in `ops/documents.py`


class ChosenKeys(NamedTuple):
    """In the place of a mask: the few cached keys that any query sees."""

    columns: torch.Tensor  # [count]
    mask: torch.Tensor  # [batch, heads or 1, queries, count], added to the scores


class PatternAttention(Attention):
    """Attention to what a pattern shows. `shown` is the pattern's definition, `whole` its fast form."""

    @staticmethod
    def shown(config, query_place: torch.Tensor, key_place: torch.Tensor) -> torch.Tensor:
        """How often a key counts for a query of the same document, [batch, heads or 1, queries, keys], of places
        [batch, queries] and [batch, keys]."""
        raise NotImplementedError

    def whole(self, query, key, value, **options) -> torch.Tensor:
        """[batch, length, heads, dim] of all."""
        raise NotImplementedError

    def attend(self, query, key, value, attention_mask, **kwargs):
        if isinstance(attention_mask, WholeTexts):
            tokens = (x.transpose(1, 2) for x in (query, key, value))
            dropout = self.attention_dropout if self.training else 0.0
            told = {"documents": attention_mask.documents, "scale": self.scaling, "dropout": dropout}
            return self.whole(*tokens, **told).contiguous(), None
        if isinstance(attention_mask, ChosenKeys):
            key, value = (x.index_select(2, attention_mask.columns) for x in (key, value))
            attention_mask = attention_mask.mask
        return super().attend(query, key, value, attention_mask.to(query.dtype), **kwargs)


class StridedAttention(PatternAttention):
    """The last `stride` tokens, and every `stride`-th before (Child et al., 2019, arXiv:1904.10509)."""

    @staticmethod
    def shown(config, query_place, key_place):
        return sees_strided(query_place[:, None, :, None], key_place[:, None, None], config.stride)

    def whole(self, query, key, value, **options):
        return strided_attention(query, key, value, self.config.stride, **options)


class FixedAttention(PatternAttention):
    """A token's block of `stride`, and the last `summary_columns` of each before (Child et al., 2019)."""

    @staticmethod
    def shown(config, query_place, key_place):
        places = query_place[:, None, :, None], key_place[:, None, None]
        return sees_fixed(*places, config.stride, config.summary_columns)

    def whole(self, query, key, value, **options):
        kernel = written_out if self.config._attn_implementation == "eager" else fused
        sizes = self.config.stride, self.config.summary_columns
        return fixed_attention(query, key, value, *sizes, kernel=kernel, **options)


class DilatedAttention(PatternAttention):
    """Segments that grow as they thin out (LongNet: Ding et al., 2023, arXiv:2307.02486)."""

    @staticmethod
    def shown(config, query_place, key_place):
        sizes = config.num_attention_heads, config.dilated_segments, config.dilations
        return times_shown(query_place, key_place, *sizes)

    def whole(self, query, key, value, **options):
        return dilated_attention(query, key, value, self.config.dilated_segments, self.config.dilations, **options)
