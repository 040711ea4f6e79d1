"""A stack whose norm, wiring and positions the config names: each choice is a class, picked once."""

from torch import nn

from ..layers.norm import RMSNorm
from ..layers.positions import (
    AlibiBias,
    LearnedPositions,
    NoPositions,
    RotaryEmbedding,
    SinkRotaryEmbedding,
    SinusoidalPositions,
    T5Bias,
    XPosRotaryEmbedding,
)
from ..layers.residual import DeepNorm, Parallel, PostNorm, PreNorm
from .backbone import Backbone
from .config import ArchConfig

NORMS = {"rms_norm": RMSNorm, "layer_norm": nn.LayerNorm}
WIRINGS = {"pre_norm": PreNorm, "post_norm": PostNorm, "deep_norm": DeepNorm, "parallel": Parallel}
POSITIONS = {
    "none": NoPositions,
    "sinusoidal": SinusoidalPositions,
    "learned": LearnedPositions,
    "rope": RotaryEmbedding,
    "xpos": XPosRotaryEmbedding,
    "alibi": AlibiBias,
    "t5": T5Bias,
}


def positions_of(config: ArchConfig) -> type[nn.Module]:
    """What `config.position_type` names. Where layers see sinks, a rotation also says how they are asked."""
    sinks = "sink_attention" in config.layer_types and config.position_type == "rope"
    return SinkRotaryEmbedding if sinks else POSITIONS[config.position_type]


class Laboratory(Backbone):
    """`config.norm_type`, `config.residual_type` and `config.position_type` fill the slots of the stack."""

    def __init__(self, config: ArchConfig):
        self.norm_class = NORMS[config.norm_type]
        self.residual = WIRINGS[config.residual_type]
        self.positions = positions_of(config)
        super().__init__(config)
