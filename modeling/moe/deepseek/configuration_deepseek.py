"""DeepSeek-V2 and V3 (DeepSeek-AI, 2024, arXiv:2405.04434 and arXiv:2412.19437)."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.config import TENSOR_PARALLEL, AttentionConfig
from ...skeleton.expert_config import EXPERT_PARALLEL

SHARED_EXPERTS = {
    "layers.*.feed_forward.shared_experts.gate_proj": "colwise",
    "layers.*.feed_forward.shared_experts.up_proj": "colwise",
    "layers.*.feed_forward.shared_experts.down_proj": "rowwise",
}


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
    num_local_experts, num_experts_per_tok, n_shared_experts, moe_intermediate_size (`int`):
        Experts of a layer (`n_routed_experts` in the originals), how many of them a token takes, how many more all
        tokens take, and the width inside one: by default those of a token are together `intermediate_size` wide.
    first_k_dense_replace (`int`, defaults to 1):
        How many of the first layers have a dense feed-forward, where `feed_forward_types` does not say.
    topk_method (`str`, defaults to `"noaux_tc"`):
        How experts are chosen: `"greedy"`, the likeliest by a softmax; `"group_limited_greedy"`, the same within the
        `topk_group` best of `n_group` groups (V2); `"noaux_tc"`, by sigmoids and a bias that keeps experts equally
        busy, within groups (V3).
    norm_topk_prob (`bool`), routed_scaling_factor (`float`):
        Whether the weights of a token's experts are made to sum to one, and what they are multiplied by then.
    router_bias_update_rate (`float`, defaults to 0.001):
        By how much that bias changes after each optimizer step.
    sequence_balance_coef (`float`, defaults to 0.0001):
        Weight of a loss in training that keeps experts equally busy within each document; 0: none.
    num_nextn_predict_layers (`int`, defaults to 0), mtp_loss_coef (`float`, defaults to 0.1):
        How many more layers `ForCausalLM` has that each name one token further, for a loss in training of this weight;
        at inference they are not asked.
    """

    model_type = "hf_arch_deepseek"
    base_model_tp_plan = {
        "layers.*.mixer.query.q_proj": "colwise",
        "layers.*.mixer.query.q_b_proj": "colwise",
        "layers.*.mixer.kv_a_proj": "mla_kv_a_proj",
        "layers.*.mixer.expansion.kv_b_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
    }
    base_model_ep_plan = EXPERT_PARALLEL["sparse"]
    layer_kinds = ("latent_attention",)

    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_local_experts: int | None = 64
    num_experts_per_tok: int = 6
    n_shared_experts: int = 2
    first_k_dense_replace: int = 1
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    router_bias_update_rate: float | int = 0.001
    sequence_balance_coef: float | int = 0.0001
    num_nextn_predict_layers: int = 0
    mtp_loss_coef: float | int = 0.1

    def __post_init__(self, **kwargs):
        if self.qk_nope_head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.qk_nope_head_dim = self.hidden_size // self.num_attention_heads
        width = self.qk_nope_head_dim
        if width is not None:  # proportions of the papers
            self.kv_lora_rank = self.kv_lora_rank or 4 * width
            self.qk_rope_head_dim = self.qk_rope_head_dim or max(2, width // 4 * 2)
            self.v_head_dim = self.v_head_dim or width
        self.head_dim = self.qk_rope_head_dim  # what positions turn
        if self.moe_intermediate_size is None:
            taken = max(1, self.num_experts_per_tok + self.n_shared_experts)
            self.moe_intermediate_size = max(1, self.intermediate_size // taken)
        super().__post_init__(**kwargs)

    def feed_forward_pattern(self) -> list[str]:
        dense = min(self.first_k_dense_replace, self.num_hidden_layers)
        return ["gated"] * dense + ["sparse"] * (self.num_hidden_layers - dense)

    def mixer_tp_plan(self) -> dict[str, str]:
        """Of the queries, those that there are."""
        absent = "q_b_proj" if self.q_lora_rank is None else "q_proj"
        return {rule: style for rule, style in super().mixer_tp_plan().items() if not rule.endswith(f".{absent}")}

    def stack_tp_plan(self) -> dict[str, str]:
        """Also of the shared experts, and of further layers."""
        parts = TENSOR_PARALLEL
        if self.n_shared_experts:
            parts = parts | {"sparse": parts["sparse"] | SHARED_EXPERTS}
        return self.with_further_layers(parts, dict(self.mixer_tp_plan()))

    def expert_ep_plan(self) -> dict[str, str]:
        return self.with_further_layers(EXPERT_PARALLEL, {})

    def with_further_layers(self, parts: dict[str, dict[str, str]], plan: dict[str, str]) -> dict[str, str]:
        """`plan` and the parts of the feed-forwards in use; further layers are as the last one of the stack."""
        whole, of_last = dict(plan), dict(plan)
        for kind in self.feed_forward_types:
            whole |= parts.get(kind, {})
            of_last = plan | parts.get(kind, {})
        if self.num_nextn_predict_layers:
            whole |= {rule.replace("layers.*", "mtp.*.layer"): style for rule, style in of_last.items()}
        return whole

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
        counts = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
        for name in (*counts, "router_bias_update_rate", "sequence_balance_coef", "mtp_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if self.has_experts:
            self.check_groups()

    def check_groups(self):
        """Raise ValueError where experts do not make up the groups, or a token finds too few in those that it takes."""
        experts, groups = self.num_local_experts, self.n_group
        if groups < 1 or experts % groups:
            raise ValueError(f"num_local_experts {experts} is not a multiple of n_group {groups}.")
        if not 1 <= self.topk_group <= groups:
            raise ValueError(f"topk_group {self.topk_group} is not between 1 and n_group {groups}.")
        if self.topk_method == "greedy" and self.topk_group != groups:
            raise ValueError("topk_method 'greedy' knows no groups: take group_limited_greedy, or set both to 1.")
        if self.topk_method == "noaux_tc" and experts // groups < 2:
            raise ValueError(f"A group is worth its best two experts: {experts} in {groups} groups are too few.")
        if self.num_experts_per_tok > self.topk_group * (experts // groups):
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {self.topk_group} groups of "
                f"{experts // groups} experts that a token takes have."
            )
