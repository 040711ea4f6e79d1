"""DeepSeek-V2 and V3 (DeepSeek-AI, 2024, arXiv:2405.04434 and arXiv:2412.19437)."""

import math

from huggingface_hub.dataclasses import strict

from ...skeleton.config import AttentionConfig


@strict
class ArchDeepSeekConfig(AttentionConfig):
    """
    kv_lora_rank (`int`, *optional*):
        Width of the latent that keys and values are made of, all that is cached of a token beside one key of
        `qk_rope_head_dim`. By default 4 `qk_nope_head_dim`.
    q_lora_rank (`int`, *optional*):
        Width of what queries are made of; by default they are made of the hidden states.
    qk_nope_head_dim, qk_rope_head_dim, v_head_dim (`int`, *optional*):
        Widths of a head: of queries and keys without and with positions, and of values. By default hidden_size /
        num_attention_heads, half of it, and as much as the first.
    """

    model_type = "hf_arch_deepseek"
    base_model_tp_plan = {
        "layers.*.mixer.query.q_proj": "colwise",
        "layers.*.mixer.query.q_b_proj": "colwise",
        "layers.*.mixer.kv_a_proj": "mla_kv_a_proj",
        "layers.*.mixer.expansion.kv_b_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
    }
    layer_kinds = ("latent_attention",)

    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None

    def __post_init__(self, **kwargs):
        if self.qk_nope_head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.qk_nope_head_dim = self.hidden_size // self.num_attention_heads
        width = self.qk_nope_head_dim
        if width is not None:  # proportions of the papers
            self.kv_lora_rank = self.kv_lora_rank or 4 * width
            self.qk_rope_head_dim = self.qk_rope_head_dim or max(2, width // 4 * 2)
            self.v_head_dim = self.v_head_dim or width
        self.head_dim = self.qk_rope_head_dim  # what positions turn
        super().__post_init__(**kwargs)

    def mixer_tp_plan(self) -> dict[str, str]:
        """Of the queries, those that there are."""
        absent = "q_b_proj" if self.q_lora_rank is None else "q_proj"
        return {rule: style for rule, style in super().mixer_tp_plan().items() if not rule.endswith(f".{absent}")}

    @property
    def attention_scaling(self) -> float:
        """What scores are multiplied by: 1 / sqrt(width), and the square of what YaRN (arXiv:2309.00071) asks for where
        `mscale_all_dim` says that it is asked of all numbers of a head."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        rope = self.rope_parameters
        if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
            scale *= (0.1 * rope["mscale_all_dim"] * math.log(max(rope["factor"], 1.0)) + 1.0) ** 2
        return scale

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError("Keys and values are made for every head: leave num_key_value_heads out.")
