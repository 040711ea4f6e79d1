"""The Switch Transformer (Fedus et al., 2021, arXiv:2101.03961): T5, where every other feed-forward is of many experts,
of which each token takes one."""

from ...layers.attention import Attention, BidirectionalAttention, CrossAttention, SlidingAttention
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.conditional_generation import ConditionalGeneration
from ...skeleton.heads import CausalLM
from ...skeleton.laboratory import Laboratory
from ...skeleton.seq2seq import EncoderDecoder, EncoderOnly
from .configuration_switch import ArchSwitchConfig


class ArchSwitchEncoder(Laboratory):
    config: ArchSwitchConfig
    mixers = {"bidirectional_attention": BidirectionalAttention}


class ArchSwitchDecoder(Laboratory):
    """The decoder alone."""

    config: ArchSwitchConfig
    mixers = {"full_attention": Attention, "sliding_attention": SlidingAttention}


class ArchSwitchCrossDecoder(ArchSwitchDecoder):
    cross_attention = CrossAttention


class ArchSwitchModel(EncoderDecoder):
    config: ArchSwitchConfig
    encoder_backbone = ArchSwitchEncoder
    decoder_backbone = ArchSwitchCrossDecoder


class ArchSwitchEncoderModel(EncoderOnly):
    config: ArchSwitchConfig
    encoder_backbone = ArchSwitchEncoder


class ArchSwitchForConditionalGeneration(ConditionalGeneration):
    config: ArchSwitchConfig
    backbone = ArchSwitchModel


class ArchSwitchForCausalLM(CausalLM):
    """Of a decoder alone."""

    config: ArchSwitchConfig
    backbone = ArchSwitchDecoder

    def add_head(self, config):
        if not config.is_decoder:
            raise ValueError(
                "A language model is a decoder alone: its config has is_decoder=True and is_encoder_decoder=False."
            )
        super().add_head(config)


class ArchSwitchForSequenceClassification(SequenceClassification):
    config: ArchSwitchConfig
    backbone = ArchSwitchEncoderModel


class ArchSwitchForTokenClassification(TokenClassification):
    config: ArchSwitchConfig
    backbone = ArchSwitchEncoderModel


class ArchSwitchForQuestionAnswering(QuestionAnswering):
    config: ArchSwitchConfig
    backbone = ArchSwitchEncoderModel
