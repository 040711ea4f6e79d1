"""BigBird (Zaheer et al., 2020, arXiv:2007.14062)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ...ops.random_blocks import BlockChoice
from ...skeleton.directed import DirectedConfig
from ...skeleton.expert_config import SPARSE


@strict
class ArchBigBirdConfig(DirectedConfig):
    """
    direction (`str`, defaults to `"bidirectional"`):
        `"bidirectional"`, an encoder; `"causal"`, a decoder.
    block_size (`int`, defaults to 64):
        Tokens of a block. A token sees all tokens of the blocks that its own block sees.
    num_window_blocks (`int`, defaults to 3):
        How many blocks around itself, with itself, a block of an encoder sees; of a decoder, up to itself.
    num_random_blocks (`int`, defaults to 3):
        How many others it sees, chosen by a hash of `random_seed`, the layer, and both their places.
    num_global_blocks (`int`, defaults to 1):
        How many blocks at the start of each document all see, and, of an encoder, as many at its end; these blocks of
        an encoder see all (internal transformer construction, ITC).
    num_extra_global_tokens (`int`, defaults to 0):
        How many learned tokens ahead of each document see all of it, and all of it sees (extended transformer
        construction, ETC). With them, `num_global_blocks` is 0 by default.
    random_seed (`int`, defaults to 0):
        Another one, other random blocks.
    """

    model_type = "hf_arch_bigbird"
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
    }
    layer_kinds = ("block_sparse_attention", "causal_block_sparse_attention")
    layer_kinds_of = {"bidirectional": ("block_sparse_attention",), "causal": ("causal_block_sparse_attention",)}
    feed_forward_kinds = ("dense", *SPARSE)

    vocab_size: int = 50358
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    direction: Literal["bidirectional", "causal"] = "bidirectional"
    block_size: int = 64
    num_window_blocks: int = 3
    num_random_blocks: int = 3
    num_global_blocks: int | None = None
    num_extra_global_tokens: int = 0
    random_seed: int = 0
    max_position_embeddings: int = 4096
    hidden_act: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-12
    attention_bias: bool = True
    mlp_bias: bool = True
    embedding_norm: bool = True
    type_vocab_size: int = 2
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1

    def __post_init__(self, **kwargs):
        if self.num_global_blocks is None:
            self.num_global_blocks = 0 if self.num_extra_global_tokens else 1
        super().__post_init__(**kwargs)

    @property
    def block_choice(self) -> BlockChoice:
        causal, ends = self.direction == "causal", self.num_global_blocks
        kinds = self.num_window_blocks, ends, 0 if causal else ends, self.num_random_blocks
        return BlockChoice(*kinds, causal=causal, seed=self.random_seed)

    def validate_architecture(self):
        super().validate_architecture()
        least = {"block_size": 1, "num_window_blocks": 1, "num_random_blocks": 0, "num_global_blocks": 0}
        for name, number in (least | {"num_extra_global_tokens": 0, "random_seed": 0}).items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {number}.")
        if self.direction == "causal" and self.num_extra_global_tokens:
            raise ValueError(
                "num_extra_global_tokens of a decoder must be 0: they read the text behind them, which is the future."
            )
        if self.direction == "bidirectional" and self.num_window_blocks % 2 == 0:
            raise ValueError(
                f"num_window_blocks is {self.num_window_blocks}: half of them but one is on each side, so it is odd."
            )
