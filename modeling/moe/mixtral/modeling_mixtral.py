"""Mixtral (Jiang et al., 2024, arXiv:2401.04088): a decoder whose feed-forwards are sparse mixtures of experts."""

from ...layers.attention import Attention, SlidingAttention
from ...layers.positions import RotaryEmbedding
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from .configuration_mixtral import ArchMixtralConfig


class ArchMixtralModel(Backbone):
    config: ArchMixtralConfig
    mixers = {"full_attention": Attention, "sliding_attention": SlidingAttention}
    positions = RotaryEmbedding


class ArchMixtralForCausalLM(CausalLM):
    config: ArchMixtralConfig
    backbone = ArchMixtralModel


class ArchMixtralForSequenceClassification(SequenceClassification):
    config: ArchMixtralConfig
    backbone = ArchMixtralModel


class ArchMixtralForTokenClassification(TokenClassification):
    config: ArchMixtralConfig
    backbone = ArchMixtralModel


class ArchMixtralForQuestionAnswering(QuestionAnswering):
    config: ArchMixtralConfig
    backbone = ArchMixtralModel
