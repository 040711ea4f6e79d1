"""The Sparse Transformer (Child et al., 2019, arXiv:1904.10509), as in GPT-3 (Brown et al., 2020, arXiv:2005.14165),
and other decoders whose layers see only some of the text."""

from torch import nn

from ...layers.attention import Attention, SlidingAttention
from ...layers.pattern_attention import DilatedAttention, FixedAttention, StridedAttention
from ...layers.retrieval_attention import RetrievalAttention
from ...layers.window_attention import CausalWindowAttention
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from ...skeleton.laboratory import positions_of
from ...skeleton.pattern_masks import pattern_mask
from .configuration_sparse_transformer import ArchSparseTransformerConfig

PATTERN_MIXERS = {
    "strided_attention": StridedAttention,
    "fixed_attention": FixedAttention,
    "dilated_attention": DilatedAttention,
}


class ArchSparseTransformerModel(Backbone):
    config: ArchSparseTransformerConfig
    norm_class = nn.LayerNorm
    mixers = {
        "full_attention": Attention,
        "sliding_attention": SlidingAttention,
        "sink_attention": CausalWindowAttention,
        "retrieval_attention": RetrievalAttention,
        **PATTERN_MIXERS,
    }
    masks = {kind: pattern_mask(mixer) for kind, mixer in PATTERN_MIXERS.items()}

    def __init__(self, config: ArchSparseTransformerConfig):
        self.positions = positions_of(config)
        super().__init__(config)


class ArchSparseTransformerForCausalLM(CausalLM):
    config: ArchSparseTransformerConfig
    backbone = ArchSparseTransformerModel


class ArchSparseTransformerForSequenceClassification(SequenceClassification):
    config: ArchSparseTransformerConfig
    backbone = ArchSparseTransformerModel


class ArchSparseTransformerForTokenClassification(TokenClassification):
    config: ArchSparseTransformerConfig
    backbone = ArchSparseTransformerModel


class ArchSparseTransformerForQuestionAnswering(QuestionAnswering):
    config: ArchSparseTransformerConfig
    backbone = ArchSparseTransformerModel
