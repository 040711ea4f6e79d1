"""Reformer (Kitaev et al., 2020, arXiv:2001.04451)."""

import math
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.directed import DirectedConfig


@strict
class ArchReformerConfig(DirectedConfig):
    """
    layer_types (`list[str]`, *optional*):
        `"local_attention"` and `"lsh_attention"`, by default in turns: attention to near tokens, and to those that hash
        to the same bucket.
    direction (`str`, defaults to `"causal"`):
        `"causal"`, or `"bidirectional"`: an encoder.
    bucketing (`str`, *optional*):
        `"ranked"`: a token sees those of its bucket that arrived in its own block or the block before. The default of
        causal models, which it keeps causal. `"sorted"`, as in the paper: it sees those near to it when all tokens of
        the document are sorted by bucket. The default of encoders; it keeps no cache, and where a later token falls
        changes what an earlier one sees.
    lsh_attn_chunk_length, local_attn_chunk_length (`int`):
        Tokens of a block.
    num_buckets (`int` or `list[int]`, defaults to 64):
        Even; or even factors of it, which make hashing cheaper. About twice the blocks of a text is right.
    num_hashes (`int`, defaults to 1):
        Rounds of hashing, each with rotations of its own.
    head_dim (`int`, *optional*):
        The width of a head, by default `hidden_size / num_attention_heads`.
    position_type (`str`, defaults to `"axial"`):
        `"axial"`, `"learned"`, `"sinusoidal"` or `"none"`.
    axial_pos_shape, axial_pos_embds_dim (`list[int]`, *optional*):
        Rows and columns of the grid that positions are written into, line by line, at least `max_position_embeddings`
        in all; and how much of `hidden_size` tells the row, and the column.
    """

    model_type = "hf_arch_reformer"
    layer_kinds = ("local_attention", "lsh_attention")
    feed_forward_kinds: ClassVar[tuple[str, ...]] = ("dense", "gated")

    tie_last_hidden_states: ClassVar[bool] = False  # those of layers are one stream, what the stack answers is both

    bucketing: Literal["ranked", "sorted"] | None = None
    lsh_attn_chunk_length: int = 64
    local_attn_chunk_length: int = 64
    num_buckets: int | list[int] = 64
    num_hashes: int = 1
    head_dim: int | None = None
    hidden_act: str = "relu"
    mlp_bias: bool = True
    position_type: Literal["axial", "learned", "sinusoidal", "none"] = "axial"
    axial_pos_shape: list[int] | None = None
    axial_pos_embds_dim: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.bucketing is None:
            self.bucketing = "ranked" if self.direction == "causal" else "sorted"
        if self.bucketing == "sorted":
            self.use_cache = False
        if self.head_dim is None and self.hidden_size % max(1, self.num_attention_heads) == 0:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.axial_pos_shape is None:
            columns = 2 ** math.ceil(math.log2(max(1, self.max_position_embeddings)) / 2)
            self.axial_pos_shape = [-(-self.max_position_embeddings // columns), columns]
        if self.axial_pos_embds_dim is None:
            self.axial_pos_embds_dim = [self.hidden_size // 4, self.hidden_size - self.hidden_size // 4]
        super().__post_init__(**kwargs)

    def layer_pattern(self) -> list[str]:
        return list(self.layer_kinds)

    @property
    def output_size(self) -> int:
        return 2 * self.hidden_size

    @property
    def bucket_factors(self) -> list[int]:
        return [self.num_buckets] if isinstance(self.num_buckets, int) else self.num_buckets

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("lsh_attn_chunk_length", "local_attn_chunk_length", "num_hashes", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.bucket_factors or any(factor < 2 or factor % 2 for factor in self.bucket_factors):
            raise ValueError(f"num_buckets is {self.num_buckets}; it, or each of its factors, must be even.")
        if self.direction == "bidirectional" and self.bucketing == "ranked":
            raise ValueError("bucketing 'ranked' is causal: an encoder takes 'sorted'.")
        if self.tie_word_embeddings:
            raise ValueError("The head reads two streams, and is twice as wide as an embedding: they cannot be tied.")
        if self.position_type == "axial":
            self.validate_axes()

    def validate_axes(self):
        shape, sizes = self.axial_pos_shape, self.axial_pos_embds_dim
        if len(shape) != 2 or min(shape) < 1 or math.prod(shape) < self.max_position_embeddings:
            raise ValueError(
                f"axial_pos_shape {shape} is no grid of two axes for {self.max_position_embeddings} positions "
                "(max_position_embeddings)."
            )
        if len(sizes) != 2 or min(sizes) < 1 or sum(sizes) != self.hidden_size:
            raise ValueError(f"axial_pos_embds_dim {sizes} are not two that make hidden_size {self.hidden_size}.")
