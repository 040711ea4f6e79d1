"""The encoder-decoder Transformer (Vaswani et al., 2017, arXiv:1706.03762), as in T5 (Raffel et al., 2020,
arXiv:1910.10683) and with the choices of later models."""

from ...layers.attention import Attention, BidirectionalAttention, CrossAttention, SlidingAttention
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.conditional_generation import ConditionalGeneration
from ...skeleton.laboratory import Laboratory
from ...skeleton.seq2seq import EncoderDecoder, EncoderOnly
from .configuration_encoder_decoder import ArchEncoderDecoderConfig


class ArchEncoderDecoderEncoder(Laboratory):
    config: ArchEncoderDecoderConfig
    mixers = {"bidirectional_attention": BidirectionalAttention}


class ArchEncoderDecoderDecoder(Laboratory):
    config: ArchEncoderDecoderConfig
    mixers = {"full_attention": Attention, "sliding_attention": SlidingAttention}
    cross_attention = CrossAttention


class ArchEncoderDecoderModel(EncoderDecoder):
    config: ArchEncoderDecoderConfig
    encoder_backbone = ArchEncoderDecoderEncoder
    decoder_backbone = ArchEncoderDecoderDecoder


class ArchEncoderDecoderEncoderModel(EncoderOnly):
    config: ArchEncoderDecoderConfig
    encoder_backbone = ArchEncoderDecoderEncoder


class ArchEncoderDecoderForConditionalGeneration(ConditionalGeneration):
    config: ArchEncoderDecoderConfig
    backbone = ArchEncoderDecoderModel


class ArchEncoderDecoderForSequenceClassification(SequenceClassification):
    config: ArchEncoderDecoderConfig
    backbone = ArchEncoderDecoderEncoderModel


class ArchEncoderDecoderForTokenClassification(TokenClassification):
    config: ArchEncoderDecoderConfig
    backbone = ArchEncoderDecoderEncoderModel


class ArchEncoderDecoderForQuestionAnswering(QuestionAnswering):
    config: ArchEncoderDecoderConfig
    backbone = ArchEncoderDecoderEncoderModel
