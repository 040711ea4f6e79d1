"""DeepSeek-V2 and V3 (DeepSeek-AI, 2024, arXiv:2405.04434 and arXiv:2412.19437): a decoder that remembers a latent of
each token, with sparse feed-forwards of many small experts."""

from ...layers.latent_attention import LatentAttention
from ...layers.positions import RotaryEmbedding
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from .configuration_deepseek import ArchDeepSeekConfig


class ArchDeepSeekModel(Backbone):
    config: ArchDeepSeekConfig
    mixers = {"latent_attention": LatentAttention}
    positions = RotaryEmbedding


class ArchDeepSeekForCausalLM(CausalLM):
    config: ArchDeepSeekConfig
    backbone = ArchDeepSeekModel


class ArchDeepSeekForSequenceClassification(SequenceClassification):
    config: ArchDeepSeekConfig
    backbone = ArchDeepSeekModel


class ArchDeepSeekForTokenClassification(TokenClassification):
    config: ArchDeepSeekConfig
    backbone = ArchDeepSeekModel


class ArchDeepSeekForQuestionAnswering(QuestionAnswering):
    config: ArchDeepSeekConfig
    backbone = ArchDeepSeekModel
