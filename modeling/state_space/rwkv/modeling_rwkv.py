"""RWKV (Peng et al., 2023, arXiv:2305.13048): a recurrence over channels; feed-forwards that see the token before."""

from torch import nn
from transformers import initialization as init

from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from .configuration_rwkv import ArchRWKVConfig
from .rwkv4 import RWKV4ChannelMixing, RWKV4TimeMixing

EMBEDDING_STD = 1e-4  # of the official code: small, since a norm follows, so that embeddings soon find their directions


class ArchRWKVModel(Backbone):
    config: ArchRWKVConfig
    mixers = {"rwkv4": RWKV4TimeMixing}
    feed_forwards = Backbone.feed_forwards | {"rwkv4_channel_mixing": RWKV4ChannelMixing}
    norm_class = nn.LayerNorm

    def init_parameters(self, std: float) -> None:
        init.copy_(self.embed_tokens.weight, self.embed_tokens.weight * (EMBEDDING_STD / (std or 1.0)))


class ArchRWKVForCausalLM(CausalLM):
    config: ArchRWKVConfig
    backbone = ArchRWKVModel


class ArchRWKVForSequenceClassification(SequenceClassification):
    config: ArchRWKVConfig
    backbone = ArchRWKVModel


class ArchRWKVForTokenClassification(TokenClassification):
    config: ArchRWKVConfig
    backbone = ArchRWKVModel


class ArchRWKVForQuestionAnswering(QuestionAnswering):
    config: ArchRWKVConfig
    backbone = ArchRWKVModel
