"""The Sparse Transformer (Child et al., 2019, arXiv:1904.10509), as in GPT-3 (Brown et al., 2020, arXiv:2005.14165),
and other decoders whose layers see only some of the text."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.config import SinkAttentionConfig
from ...skeleton.expert_config import SPARSE


@strict
class ArchSparseTransformerConfig(SinkAttentionConfig):
    """The default is a GPT-3: dense layers and locally banded ones in turn.

    layer_types (`list[str]`, *optional*):
        Of each layer, `"full_attention"`; `"sliding_attention"`, the last `sliding_window` tokens;
        `"strided_attention"`, the last `stride` and every `stride`-th before; `"fixed_attention"`, a token's block of
        `stride` and the last columns of each before; `"dilated_attention"`, segments that grow as they thin out
        (LongNet, arXiv:2307.02486); `"sink_attention"`, the last `sliding_window` tokens and the first of the text
        (StreamingLLM, arXiv:2309.17453), whose memory does not grow; `"retrieval_attention"`, the same tokens at their
        true distance and the blocks of earlier ones that suit a query best (Quest, arXiv:2406.10774), so that a step
        reads as many keys however long the text, of a memory that grows.
    position_type (`str`, defaults to `"learned"`):
        `"none"`, `"sinusoidal"`, `"learned"` or `"rope"`. A text without end needs `"rope"` or `"none"`.
    stride, summary_columns (`int`):
        Of strided and fixed layers: l and c of the paper. Cost grows as n^1.5 where the stride is about sqrt(n).
    dilated_segments, dilations (`list[int]`):
        Of dilated layers: the lengths of segments, each with the distance of the tokens that are taken of it.
    num_sink_tokens (`int`, defaults to 4):
        The first tokens, which all later ones see in a layer of type `"sink_attention"` or `"retrieval_attention"`.
    retrieved_blocks, retrieval_block_size (`int`):
        Of layers of type `"retrieval_attention"`: how many blocks a token chooses before its window, for each head, and
        how many tokens one has, at most `sliding_window`.
    attention_scaling (`float`, *optional*):
        What the products of queries and keys are multiplied by, head_dim^-0.5 by default; 1.0 in GPT-Neo.
    """

    model_type = "hf_arch_sparse_transformer"
    layer_kinds = (
        *("full_attention", "sliding_attention", "strided_attention", "fixed_attention", "dilated_attention"),
        *("sink_attention", "retrieval_attention"),
    )
    feed_forward_kinds = ("dense", "gated", *SPARSE)

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    position_type: Literal["none", "sinusoidal", "learned", "rope"] = "learned"
    sliding_window: int | None = 256
    stride: int = 128
    summary_columns: int = 8
    dilated_segments: list[int] | None = None
    dilations: list[int] | None = None
    retrieved_blocks: int = 8
    retrieval_block_size: int = 64
    attention_scaling: float | int | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.dilated_segments is None and self.dilations is None:
            self.dilated_segments, self.dilations = [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16]
        super().__post_init__(**kwargs)

    def mixer_tp_plan(self) -> dict[str, str]:
        dilated = "dilated_attention" in self.layer_types  # which tokens a head takes does not follow it to its shard
        return {} if dilated else super().mixer_tp_plan()

    def layer_pattern(self) -> list[str]:
        return ["full_attention", "sliding_attention"]

    @property
    def turns_pairs(self) -> bool:
        return self.position_type == "rope"

    def validate_architecture(self):
        super().validate_architecture()
        if "retrieval_attention" in self.layer_types and not (
            self.sliding_window and 1 <= self.retrieval_block_size <= self.sliding_window and self.retrieved_blocks > 0
        ):
            raise ValueError(
                f"Layers of type retrieval_attention need a retrieval_block_size, {self.retrieval_block_size}, between "
                f"1 and sliding_window, {self.sliding_window}, and retrieved_blocks, {self.retrieved_blocks}, above 0."
            )
        if self.stride < 1 or not 1 <= self.summary_columns <= self.stride:
            raise ValueError(
                f"summary_columns {self.summary_columns} is not between 1 and stride {self.stride}: they are the last "
                "columns of a block of that many tokens."
            )
        if self.attention_scaling is not None and self.attention_scaling <= 0:
            raise ValueError(f"attention_scaling is {self.attention_scaling}; it must be positive.")
        if self.position_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"position_type 'sinusoidal' needs an even hidden_size, not {self.hidden_size}.")
        self.validate_dilations()

    def validate_dilations(self):
        segments, dilations = self.dilated_segments or [], self.dilations or []
        if not segments or len(segments) != len(dilations):
            raise ValueError(
                f"dilated_segments has {len(segments)} entries and dilations {len(dilations)}: each segment has one."
            )
        for segment, dilation in zip(segments, dilations, strict=True):
            if dilation < 1 or segment < 1 or segment % dilation:
                raise ValueError(f"A segment of {segment} tokens cannot be taken every {dilation}: it must divide it.")
        if 1 not in dilations:
            raise ValueError(f"dilations {dilations} leave tokens out in some heads: one of them must be 1.")
