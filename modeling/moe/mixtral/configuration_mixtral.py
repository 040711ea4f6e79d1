"""Mixtral (Jiang et al., 2024, arXiv:2401.04088)."""

from huggingface_hub.dataclasses import strict

from ...skeleton.config import AttentionConfig
from ...skeleton.expert_config import EXPERT_PARALLEL


@strict
class ArchMixtralConfig(AttentionConfig):
    """
    num_local_experts (`int`, defaults to 8), num_experts_per_tok (`int`, defaults to 2):
        Experts of a layer, and how many of them a token takes.
    """

    model_type = "hf_arch_mixtral"
    base_model_ep_plan = EXPERT_PARALLEL["sparse"]
    default_theta = 1000000.0

    num_local_experts: int | None = 8

    def feed_forward_pattern(self) -> list[str]:
        return ["sparse"]
