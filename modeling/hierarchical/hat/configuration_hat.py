"""HAT, the hierarchical attention transformer (Chalkidis et al., 2022, arXiv:2210.05529)."""

import math
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ...skeleton.config import ArchConfig
from ...skeleton.expert_config import SPARSE

READING, POOLING, ASKING = ("level", "gru"), "pool", "down"
DOCUMENT_POOLINGS = {"max": "document", "leader": "document_vector"}  # and how heads of whole texts take it
PIXEL_FIELDS = ("image_token_id", "video_token_id", "image_size", "patch_size", "num_channels")


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
        What each layer does and at which level, in any order; by default the paper's best: one layer across segments
        after every three inside them. For level 1, and so for any other:
        `"level_1"`: the members of each segment attend to one another;
        `"gru_1"`: they are read by a GRU from both sides;
        `"pool_1"`: the leader takes up its segment, a mean of the members weighted by attention (HAN). It is also a
        member of segments of level 2, and speaks for this one from here on. Not needed in HAT, whose leaders attend;
        `"down_1"`, not for level 0: from the top down, each token below attends to the members of its segment
        (Pang et al., 2022, arXiv:2203.07586). Without such layers what a level has understood reaches
        other tokens only through the leader of their segment, a level at a time.
    shared_levels (`bool`, defaults to `False`):
        Whether the first layers of all levels are one set of parameters, the second ones another, and so on: layers
        that attend share with such, those that pool, that ask or that are recurrent with theirs.
    position_type (`str`, defaults to `"learned"`):
        `"learned"`: a vector per place in a segment, of each level; `"none"`: where recurrences tell places apart.
    residual_type (`str`, defaults to `"post_norm"`):
        `"post_norm"`: norm(x + f(x)) of each part of a layer; `"replaced"`: f(x), encoders on top of one another.
    document_pooling (`str`, defaults to `"max"`):
        What speaks for a document: `"max"`, the largest of each number over its segments of level 0; `"leader"`, its
        first token, after a layer that pools the last level. With `"leader"` a head scores that vector as it is.
    max_position_embeddings (`int`, defaults to 4096):
        Tokens of a document of full segments; the last level holds `max_segments`, this over the product of
        `segment_lengths`.
    image_token_id, video_token_id (`int`, *optional*):
        The token that stands for a patch of an image, or of a frame of a video. An image is a segment of level 0, and
        so is a frame: its leader and a placeholder for each patch. Without either the model reads text alone.
    image_size, patch_size, num_channels (`int`, defaults to 224, 32 and 3):
        Height and width of images and frames in pixels, those of a patch, and numbers of a pixel.
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
    feed_forward_kinds: ClassVar[tuple[str, ...]] = ("dense", "none", *SPARSE)

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    segment_lengths: list[int] | None = None
    shared_levels: bool = False
    position_type: str = "learned"
    residual_type: str = "post_norm"
    document_pooling: str = "max"
    max_position_embeddings: int = 4096
    image_token_id: int | None = None
    video_token_id: int | None = None
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
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

    @classmethod
    def han(cls, num_levels: int = 2, reads: str = "gru", **fields) -> "ArchHatConfig":
        """The hierarchical attention network (Yang et al., 2016, aclanthology N16-1174): at each level an encoder, and
        attention pooling. Its encoders are recurrent, of half the width from each side; `reads="level"` makes them
        layers of attention with a feed-forward. `fields` are those of the config, in the place of these."""
        pattern = [f"{part}_{level}" for level in range(num_levels) for part in (reads, POOLING)]
        recurrent = {"position_type": "none", "residual_type": "replaced", "embedding_norm": False}
        own = recurrent | {"feed_forward_types": ["none"] * len(pattern)}
        if reads == "level":
            own = {"feed_forward_types": ["dense", "none"] * num_levels}
        own |= {"segment_lengths": [128] * (num_levels - 1), "document_pooling": "leader"}
        return cls(**(own | {"layer_types": pattern, "num_hidden_layers": len(pattern)} | fields))

    def to_dict(self) -> dict:
        """As of every config; what is said of images is left out where there are none."""
        fields = super().to_dict()
        return {name: value for name, value in fields.items() if self.has_pixels or name not in PIXEL_FIELDS}

    @property
    def has_pixels(self) -> bool:
        """Whether the model reads images or videos beside text."""
        return self.image_token_id is not None or self.video_token_id is not None

    @property
    def num_patches(self) -> int:
        """Those of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_levels(self) -> int:
        return len(self.segment_lengths) + 1

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        levels = range(self.num_levels)
        kinds = tuple(f"{part}_{level}" for part in (*READING, POOLING) for level in levels)
        return kinds + tuple(f"{ASKING}_{level}" for level in levels if level)

    def part_and_level(self, kind: str) -> tuple[str, int]:
        """What layers of a type do, and at which level."""
        part, _, level = kind.rpartition("_")
        return part, int(level)

    @property
    def layer_groups(self) -> list[int]:
        if not self.shared_levels:
            return super().layer_groups
        turns, groups = {}, []
        for kind in self.layer_types:
            turns[kind] = turns.get(kind, -1) + 1
            groups.append((self.part_and_level(kind)[0], turns[kind]))
        order = list(dict.fromkeys(groups))
        return [order.index(group) for group in groups]

    @property
    def first_across(self) -> int | None:
        """The first layer of the last level, where only such come from there on: what lies below is read without
        knowing of anything above. None where a lower level reads what an upper one has understood."""
        last = self.num_levels - 1
        parts = [self.part_and_level(kind) for kind in self.layer_types]
        first = [level for _, level in parts].index(last)
        return first if last and all(part != ASKING and level == last for part, level in parts[first:]) else None

    @property
    def pooling(self) -> str:
        return DOCUMENT_POOLINGS[self.document_pooling]

    def layer_pattern(self) -> list[str]:
        first, *others = (f"level_{level}" for level in range(self.num_levels))
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
        read = {level for part, level in map(self.part_and_level, self.layer_types) if part in READING}
        if idle := [f"level_{level}" for level in range(self.num_levels) if level not in read]:
            raise ValueError(
                f"No layer works at {', '.join(idle)}: name it in layer_types, or shorten segment_lengths."
            )
        for name, known in (
            ("residual_type", ("post_norm", "replaced")),
            ("position_type", ("learned", "none")),
            ("document_pooling", DOCUMENT_POOLINGS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; there are {', '.join(known)}.")
        if any(kind.startswith("gru") for kind in self.layer_types) and self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} is odd: a GRU from each side answers with half of it.")
        kinds = {}
        for group, kind in zip(self.layer_groups, self.feed_forward_types, strict=True):
            if kinds.setdefault(group, kind) != kind:
                raise ValueError(f"Layers that share parameters have feed-forwards {kinds[group]} and {kind}.")

    def validate_pixels(self):
        if not self.has_pixels:
            return
        tokens = {name: getattr(self, name) for name in PIXEL_FIELDS[:2] if getattr(self, name) is not None}
        for name, token in tokens.items():
            if not 0 <= token < self.vocab_size or token == self.pad_token_id:
                raise ValueError(f"{name} {token} is padding, or not in the vocabulary of {self.vocab_size}.")
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"image_token_id and video_token_id are both {self.image_token_id}.")
        for name in PIXEL_FIELDS[2:]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        if not self.segment_lengths or self.num_patches >= self.segment_lengths[0]:
            raise ValueError(
                f"An image is a segment of {1 + self.num_patches} members, a leader and its patches, which does not "
                f"fit into segment_lengths {self.segment_lengths}: take larger patches, or longer segments."
            )
