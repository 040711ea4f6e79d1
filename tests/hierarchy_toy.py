"""Stages of different widths, of recurrences and attention side by side, where what fires rests on the text itself."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from hf_arch.modeling.layers.attention import Attention
from hf_arch.modeling.layers.positions import RotaryEmbedding
from hf_arch.modeling.layers.window_attention import CausalWindowAttention
from hf_arch.modeling.skeleton.config import AttentionConfig
from hf_arch.modeling.skeleton.heads import CausalLM
from hf_arch.modeling.skeleton.hierarchy import Hierarchy, Resampling
from hf_arch.modeling.skeleton.hierarchy_config import AtLevel, HierarchyConfig
from hf_arch.modeling.state_space.ssd.configuration_ssd import ArchSSDConfig
from hf_arch.modeling.state_space.ssd.modeling_ssd import SSD

SIZES = (16, 24, 32)
LAYERS = {
    0: ("ssd", "causal_window_attention"),
    1: ("ragged_attention", "ssd"),
    2: ("ssd", "ragged_attention"),
}


@strict
class ToyConfig(AttentionConfig, HierarchyConfig):
    model_type = "hf_arch_hierarchy_toy"
    layer_kinds = ("ragged_attention", "causal_window_attention", "ssd")

    vocab_size: int = 96
    hidden_size: int = SIZES[0]
    intermediate_size: int = 32
    num_hidden_layers: int = 10
    num_attention_heads: int = 2
    sliding_window: int | None = 7
    initializer_range: float = 0.3
    num_levels: int = 3

    def __post_init__(self, **kwargs):
        self.layer_levels = [0, 0, 1, 1, 2, 2, 1, 1, 0, 0]
        self.layer_types = [LAYERS[level][i % 2] for i, level in enumerate(self.layer_levels)]
        super().__post_init__(**kwargs)

    def at_level(self, level: int):
        return AtLevel(self, hidden_size=SIZES[level], head_dim=SIZES[level] // 2)


class DynamicResampling(Resampling):
    """The first item fires, and those that a number of theirs and of the one before them says. They are what they make,
    made wider; the answer fades where it is not renewed."""

    def __init__(self, config: ToyConfig, level: int):
        super().__init__(config, level)
        here, above = SIZES[level], SIZES[level + 1]
        self.score = nn.Linear(2 * here, 1)
        self.up_proj, self.down_proj = nn.Linear(here, above), nn.Linear(above, here)

    def fire(self, stream, level, kept):
        held = None if kept is None else kept.read("last")
        before = torch.zeros_like(stream[:, :1]) if held is None else held.to(stream.dtype)
        pairs = torch.cat((stream, torch.cat((before, stream[:, :-1]), dim=1)), dim=-1)
        scores = self.score(pairs).squeeze(-1)
        fires = (scores > 0.3) | (level.place == 0)
        if kept is not None:
            end = torch.cat((before, stream), dim=1)
            index = fires.new_full((len(stream),), stream.shape[1], dtype=torch.long)
            index = index if level.real is None else level.real.sum(1)
            kept.write(0, last=end.gather(1, index[:, None, None].expand(-1, 1, end.shape[-1])))
        return fires if level.real is None else fires & level.real, scores

    def shorten(self, stream, fired, scores, level, kept):
        return self.up_proj(fired.rows.take(stream * scores.sigmoid()[..., None]))

    def expand(self, stream, answer, fired, scores, level, kept):
        made = None if answer is None else self.down_proj(answer)
        held = None if kept is None else kept.read("answer")
        stream = stream + fired.spread(made, held)
        if kept is not None:
            kept.write(0, answer=fired.last(made, held))
        return stream


def ssd(config, layer_idx: int) -> SSD:
    sizes = {"hidden_size": config.hidden_size, "num_attention_heads": 4, "state_size": 8}
    return SSD(ArchSSDConfig(**sizes, num_hidden_layers=layer_idx + 1), layer_idx)


class ToyModel(Hierarchy):
    config: ToyConfig
    config_class = ToyConfig
    resampling = DynamicResampling
    positions = RotaryEmbedding
    part_norm = True
    mixers = {"ragged_attention": Attention, "causal_window_attention": CausalWindowAttention, "ssd": ssd}


class ToyForCausalLM(CausalLM):
    config: ToyConfig
    config_class = ToyConfig
    backbone = ToyModel


def build() -> ToyForCausalLM:
    torch.manual_seed(0)
    model = ToyForCausalLM(ToyConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()
