"""HAT, the hierarchical attention transformer (Chalkidis et al., 2022, arXiv:2210.05529)."""

import math

from huggingface_hub.dataclasses import strict

from ...skeleton.config import ArchConfig
from ...skeleton.expert_config import SPARSE


@strict
class ArchHatConfig(ArchConfig):
    """
    A document is a hierarchy of levels. A level is a segmentation and an encoder: at level 0 segments are made of
    tokens, at each further level of the first tokens (leaders) of the segments below. The default has the two levels
    of the paper: layers inside segments, and layers across their leaders.

    segment_lengths (`list[int]`, defaults to `[128]`):
        The most members of a segment, of each level but the last, whose only segment is the document. An empty list is
        a model of one level: RoBERTa.
    layer_types (`list[str]`, *optional*):
        The level that each layer works at, `"level_0"`, `"level_1"`, ..., in any order; by default the paper's best:
        one layer across segments after every three inside them.
    max_position_embeddings (`int`, defaults to 4096):
        Tokens of a document of full segments; the last level holds `max_segments`, this over the product of
        `segment_lengths`.
    """

    model_type = "hf_arch_hat"
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }
    feed_forward_kinds = ("dense", *SPARSE)
    pooling = "document"

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    segment_lengths: list[int] | None = None
    max_position_embeddings: int = 4096
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True
    embedding_norm: bool = True
    use_cache: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.segment_lengths is None:
            self.segment_lengths = [128]
        super().__post_init__(**kwargs)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return tuple(f"level_{level}" for level in range(len(self.segment_lengths) + 1))

    def layer_pattern(self) -> list[str]:
        first, *others = self.layer_kinds
        inside = max(1, min(3, self.num_hidden_layers - len(others)))
        return [first] * inside + others

    @property
    def max_segments(self) -> int:
        """The most members of the document, at the last level."""
        return math.ceil(self.max_position_embeddings / math.prod(self.segment_lengths))

    @property
    def level_lengths(self) -> list[int]:
        """The most members of a segment, of each level."""
        return [*self.segment_lengths, self.max_segments]

    def validate_architecture(self):
        if wrong := [length for length in self.segment_lengths if length < 1]:
            raise ValueError(f"segment_lengths has {wrong[0]}: a segment has at least one member.")
        super().validate_architecture()
        if idle := [kind for kind in self.layer_kinds if kind not in self.layer_types]:
            raise ValueError(
                f"No layer works at {', '.join(idle)}: name it in layer_types, or shorten segment_lengths."
            )
