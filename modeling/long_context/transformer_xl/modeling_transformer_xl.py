"""Transformer-XL (Dai et al., 2019, arXiv:1901.02860): attention that also sees what each layer saw a segment ago."""

from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ..modeling_segment_recurrence import SegmentBackbone, SegmentCausalLM, SegmentRecurrence
from .configuration_transformer_xl import ArchTransformerXLConfig


class ArchTransformerXLModel(SegmentBackbone):
    config: ArchTransformerXLConfig
    mixers = {"segment_recurrence": SegmentRecurrence}


class ArchTransformerXLForCausalLM(SegmentCausalLM):
    config: ArchTransformerXLConfig
    backbone = ArchTransformerXLModel


class ArchTransformerXLForSequenceClassification(SequenceClassification):
    config: ArchTransformerXLConfig
    backbone = ArchTransformerXLModel


class ArchTransformerXLForTokenClassification(TokenClassification):
    config: ArchTransformerXLConfig
    backbone = ArchTransformerXLModel


class ArchTransformerXLForQuestionAnswering(QuestionAnswering):
    config: ArchTransformerXLConfig
    backbone = ArchTransformerXLModel
