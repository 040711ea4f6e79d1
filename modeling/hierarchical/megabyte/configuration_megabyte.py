"""MegaByte (Yu et al., 2023, arXiv:2305.07185)."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.config import AttentionConfig
from ...skeleton.hierarchy_config import AtLevel, HierarchyConfig


@strict
class ArchMegaByteConfig(AttentionConfig, HierarchyConfig):
    """
    vocab_size (`int`, defaults to 384):
        The ids of ByT5's tokenizer: three special ones, the 256 bytes, 125 sentinels.
    hidden_size, intermediate_size, num_attention_heads, num_key_value_heads (`int`):
        Those of the local model, which reads bytes. Models above have as much of each as they are wider, and heads of
        the same width.
    patch_sizes (`list[int]`, defaults to `[8]`):
        How many items of a level are a patch, an item of the next, at each level but the last: `[4, 8]` are patches of
        four bytes, and patches of eight of these.
    global_hidden_sizes (`list[int]`, *optional*):
        The width of each level above bytes, a multiple of the bytes that an item stands for; by default twice that of
        the level below.
    layer_levels (`list[int]`, *optional*):
        The last level first, that of bytes last: `[1, 1, 1, 0, 0]`. By default each level but the last has its share of
        the layers, and the last has two.
    position_type (`str`, defaults to `"rope"`):
        Of the last level: `"rope"`, or `"learned"`, the paper's, a vector for each byte of `max_position_embeddings`,
        those of a patch side by side. In a patch each place has its own part of the answer, and needs no other sign.
    """

    model_type = "hf_arch_megabyte"
    layer_kinds = ("ragged_attention", "patch_attention")
    feed_forward_kinds = ("dense", "gated", "sparse", "switch")

    vocab_size: int = 384
    hidden_size: int = 512
    intermediate_size: int = 2048
    max_position_embeddings: int = 8192
    patch_sizes: list[int] | None = None
    global_hidden_sizes: list[int] | None = None
    position_type: Literal["rope", "learned"] = "rope"
    hidden_act: str = "gelu"
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs):
        if self.patch_sizes is None:
            self.patch_sizes = [8]
        if self.global_hidden_sizes is None:
            self.global_hidden_sizes = [2**level * self.hidden_size for level in range(1, self.num_levels)]
        super().__post_init__(**kwargs)

    def mixer_tp_plan(self) -> dict[str, str]:
        """None: a plan names the layers of all levels alike, whose numbers of heads differ."""
        return {}

    @property
    def num_levels(self) -> int:
        return len(self.patch_sizes) + 1

    @property
    def patch_size(self) -> int:
        """Of the level that a config is of."""
        return self.patch_sizes[0]

    @property
    def level_sizes(self) -> list[int]:
        return [self.hidden_size, *self.global_hidden_sizes]

    def bytes_of(self, level: int) -> int:
        """How many bytes an item of a level stands for."""
        return math.prod(self.patch_sizes[:level])

    @property
    def byte_sizes(self) -> list[int]:
        """The width of a byte as each level reads it: side by side, as many as an item stands for are one."""
        return [size // self.bytes_of(level) for level, size in enumerate(self.level_sizes)]

    @property
    def turns_pairs(self) -> bool:
        return self.position_type == "rope"

    def level_pattern(self) -> list[int]:
        top = self.num_levels - 1
        share = self.num_hidden_layers // (self.num_levels + 1)
        below = [level for level in reversed(range(top)) for _ in range(max(1, share))]
        below = below[max(0, len(below) + 1 - self.num_hidden_layers) :]
        return [top] * (self.num_hidden_layers - len(below)) + below

    def layer_pattern(self) -> list[str]:
        """The last level sees all items before, the others their own patch."""
        return [self.layer_kinds[level < self.num_levels - 1] for level in self.layer_levels]

    def at_level(self, level: int) -> AtLevel:
        def widened(number: int) -> int:
            return number * self.level_sizes[level] // self.hidden_size

        return AtLevel(
            self,
            hidden_size=self.level_sizes[level],
            intermediate_size=widened(self.intermediate_size),
            num_attention_heads=widened(self.num_attention_heads),
            num_key_value_heads=widened(self.num_key_value_heads or self.num_attention_heads),
            max_position_embeddings=-(-self.max_position_embeddings // self.bytes_of(level)),
            patch_size=[*self.patch_sizes, None][level],
        )

    def validate_architecture(self):
        if not self.patch_sizes:
            raise ValueError("patch_sizes is empty: a model without patches is a Transformer.")
        if wrong := [size for size in self.patch_sizes if size < 2]:
            raise ValueError(f"patch_sizes has {wrong[0]}: a patch has at least two items.")
        super().validate_architecture()
        self.validate_levels()
        if self.embedding_norm or self.type_vocab_size or self.tie_word_embeddings:
            raise ValueError(
                "Embeddings hold bytes as all levels read them, side by side: embedding_norm, type_vocab_size and "
                "tie_word_embeddings are for one level."
            )

    def validate_levels(self) -> None:
        """That each level has a width and layers that fit."""
        if len(self.global_hidden_sizes) != len(self.patch_sizes):
            raise ValueError(
                f"global_hidden_sizes has {len(self.global_hidden_sizes)} entries for {len(self.patch_sizes)} "
                "patch_sizes: each makes a level, which has a width."
            )
        for level, size in enumerate(self.level_sizes):
            if size < 1 or size % self.bytes_of(level):
                raise ValueError(
                    f"The width {size} of level {level} is not a multiple of its {self.bytes_of(level)} bytes."
                )
            heads = self.num_attention_heads, self.num_key_value_heads or 0
            if any(number * size % self.hidden_size for number in heads):
                raise ValueError(
                    f"The width {size} of level {level} is not one of whole heads, as wide as those of level 0."
                )
        if self.layer_levels != sorted(self.layer_levels, reverse=True):
            raise ValueError(f"layer_levels are {self.layer_levels}: they fall from the last level to 0.")
        if self.layer_types != self.layer_pattern():
            raise ValueError(f"layer_types are {self.layer_types}; for these layer_levels, {self.layer_pattern()}.")
