"""Longformer (Beltagy et al., 2020, arXiv:2004.05150)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.directed import DirectedConfig
from ...skeleton.expert_config import SPARSE


@strict
class ArchLongformerConfig(DirectedConfig):
    """
    direction (`str`, defaults to `"bidirectional"`):
        `"bidirectional"`, an encoder; `"causal"`, a decoder, whose memory is as large as its windows.
    attention_window (`int` or `list[int]`, defaults to 512):
        Of an encoder, how many tokens one sees beside itself, half of them on each side; of a decoder, how many it sees
        with itself. One number, or one for each layer.
    attention_dilation (`int` or `list[int]`, defaults to 1):
        A token sees only every so manieth other, as many: 1 is all.
    num_global_tokens (`int`, defaults to 0):
        How many tokens at the start of each document see all, and all see them, where the call names none in
        `global_attention_mask`; heads that name or score texts take one at least. Of a decoder, those that all later
        ones see.
    sep_token_id (`int`, defaults to 2):
        The token that ends a question: those before it see all in `ForQuestionAnswering`, and those of the answer
        behind it in `ForMultipleChoice`.
    """

    model_type = "hf_arch_longformer"
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.q_global_proj": "colwise",
        "layers.*.mixer.k_global_proj": "colwise",
        "layers.*.mixer.v_global_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
    }
    layer_kinds = ("window_attention", "causal_window_attention")
    layer_kinds_of = {"bidirectional": ("window_attention",), "causal": ("causal_window_attention",)}
    feed_forward_kinds = ("dense", *SPARSE)

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    direction: Literal["bidirectional", "causal"] = "bidirectional"
    attention_window: int | list[int] = 512
    attention_dilation: int | list[int] = 1
    num_global_tokens: int = 0
    max_position_embeddings: int = 4096
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True
    embedding_norm: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    sep_token_id: int | None = 2

    def mixer_tp_plan(self) -> dict[str, str]:
        plan = super().mixer_tp_plan()
        return plan if self.direction == "bidirectional" else {k: v for k, v in plan.items() if "_global_" not in k}

    def of_layer(self, name: str, layer_idx: int) -> int:
        """`attention_window` or `attention_dilation` of a layer."""
        value = getattr(self, name)
        return value if isinstance(value, int) else value[layer_idx]

    def causal_window(self, layer_idx: int) -> tuple[int, int, int]:
        """What a layer of a decoder sees: window, dilation, first tokens."""
        sizes = (self.of_layer(f"attention_{name}", layer_idx) for name in ("window", "dilation"))
        return *sizes, self.num_global_tokens

    def validate_architecture(self):
        super().validate_architecture()
        for name, least in (("attention_window", 2), ("attention_dilation", 1)):
            value = getattr(self, name)
            values = [value] if isinstance(value, int) else value
            if not isinstance(value, int) and len(value) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(value)} entries for {self.num_hidden_layers} layers.")
            if wrong := [number for number in values if number < least]:
                raise ValueError(f"{name} has {wrong[0]}; it must be at least {least}.")
            if (
                name == "attention_window"
                and self.direction == "bidirectional"
                and (odd := [number for number in values if number % 2])
            ):
                raise ValueError(f"attention_window has {odd[0]}: half of it is on each side, so it must be even.")
        if self.num_global_tokens < 0:
            raise ValueError(f"num_global_tokens is {self.num_global_tokens}; it must not be negative.")
