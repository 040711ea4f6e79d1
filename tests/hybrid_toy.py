"""A decoder whose layers are of several kinds: a recurrence beside windows, or beside full attention."""

from huggingface_hub.dataclasses import strict

from hf_arch import Architecture
from hf_arch.modeling.layers.attention import Attention
from hf_arch.modeling.skeleton.backbone import Backbone
from hf_arch.modeling.skeleton.heads import CausalLM
from hf_arch.modeling.state_space.retnet.configuration_retnet import ArchRetNetConfig
from hf_arch.modeling.state_space.retnet.modeling_retnet import MultiScaleRetention, RetNetRotaryEmbedding
from promises import Case


@strict
class HybridConfig(ArchRetNetConfig):
    model_type = "hf_arch_hybrid_toy"
    layer_kinds = ("retention", "sliding_attention", "full_attention")

    sliding_window: int = 9


class HybridModel(Backbone):
    config: HybridConfig
    positions = RetNetRotaryEmbedding
    mixers = {"retention": MultiScaleRetention, "sliding_attention": Attention, "full_attention": Attention}


class HybridForCausalLM(CausalLM):
    config: HybridConfig
    backbone = HybridModel


class Toy(Architecture):
    def load(self, suffix: str) -> type:
        return {"Config": HybridConfig, "ForCausalLM": HybridForCausalLM}[suffix]


TOY = Toy("hybrid_toy", "Hybrid", family="tests", title="Hybrid", paper="")


def hybrid(*kinds: str) -> Case:
    return Case(TOY, "ForCausalLM", "_".join(kind[:4] for kind in kinds), {"layer_types": list(kinds)})


WINDOWED = hybrid("retention", "sliding_attention")
FULL = (hybrid("retention", "full_attention"), hybrid("full_attention", "retention"))
