"""A stack of several mixers: recurrences beside windows, as in Samba (Ren et al., 2024, arXiv:2406.07522), or beside
full attention and with experts, as in Jamba (Lieber et al., 2024, arXiv:2403.19887)."""

from collections.abc import Callable

from ...layers.attention import Attention, SlidingAttention
from ...layers.mixer import Mixer
from ...layers.window_attention import CausalWindowAttention
from ...long_context.performer.modeling_performer import ArchPerformerModel
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from ...skeleton.laboratory import Laboratory
from ..h3.modeling_h3 import ArchH3Model
from ..hyena.modeling_hyena import ArchHyenaModel
from ..retnet.modeling_retnet import ArchRetNetModel
from ..rwkv4.modeling_rwkv4 import ArchRWKV4Model
from ..rwkv7.modeling_rwkv7 import ArchRWKV7Model
from ..s4.modeling_s4 import ArchS4Model
from ..s6.modeling_s6 import ArchS6Model
from ..ssd.modeling_ssd import ArchSSDModel
from .configuration_hybrid import CONFIGS, ArchHybridConfig

GUEST_MODELS = ArchRetNetModel, ArchS4Model, ArchH3Model, ArchS6Model, ArchSSDModel
GUEST_MODELS += ArchRWKV4Model, ArchRWKV7Model, ArchHyenaModel, ArchPerformerModel
MIXERS = {kind: mixer for model in GUEST_MODELS for kind, mixer in model.mixers.items() if kind in CONFIGS}


def guest(kind: str, mixer: type[Mixer]) -> Callable[[ArchHybridConfig, int], Mixer]:
    """A mixer of another architecture, built from a config of that architecture."""
    return lambda config, layer_idx: mixer(config.of_mixer(kind), layer_idx)


class ArchHybridModel(Laboratory):
    config: ArchHybridConfig
    mixers = {
        "full_attention": Attention,
        "sliding_attention": SlidingAttention,
        "sink_attention": CausalWindowAttention,
        **{kind: guest(kind, mixer) for kind, mixer in MIXERS.items()},
    }


class ArchHybridForCausalLM(CausalLM):
    config: ArchHybridConfig
    backbone = ArchHybridModel


class ArchHybridForSequenceClassification(SequenceClassification):
    config: ArchHybridConfig
    backbone = ArchHybridModel


class ArchHybridForTokenClassification(TokenClassification):
    config: ArchHybridConfig
    backbone = ArchHybridModel


class ArchHybridForQuestionAnswering(QuestionAnswering):
    config: ArchHybridConfig
    backbone = ArchHybridModel
