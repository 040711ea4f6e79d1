"""The fields of sparse feed-forwards, which any architecture may have."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..layers.sparse import SPARSE_FEED_FORWARDS

SPARSE = tuple(SPARSE_FEED_FORWARDS)
EXPERTS = "layers.*.feed_forward.experts"
# How a weight is split where each process takes a part of every expert
PARTS = {"gate_up_proj": "packed_colwise", "up_proj": "colwise", "down_proj": "rowwise"}
WEIGHTS = {kind: (made.experts_class.first_name, "down_proj") for kind, made in SPARSE_FEED_FORWARDS.items()}
TENSOR_PARALLEL_EXPERTS = {
    kind: {f"{EXPERTS}.{name}": PARTS[name] for name in names} | {EXPERTS: "moe_tp_experts"}
    for kind, names in WEIGHTS.items()
}
EXPERT_PARALLEL = {  # where each process takes some experts as wholes
    kind: {f"{EXPERTS}.{name}": "grouped_gemm" for name in names} | {EXPERTS: "ep_dispatch_experts"}
    for kind, names in WEIGHTS.items()
}


@strict
class ExpertConfig(PreTrainedConfig):
    """Read with `feed_forward_types` and `mlp_bias`, which are `ArchConfig`'s.

    num_local_experts, num_experts_per_tok, moe_intermediate_size (`int`, *optional*):
        Of sparse feed-forwards: how many experts one has, how many of them a token takes, and the width inside an
        expert, by default `intermediate_size`.
    expert_capacity_factor, eval_capacity_factor (`float`, *optional*):
        Room that each expert has for the tokens of a document, in training and in evaluation, as a multiple of what it
        would take if all were equally busy; tokens past it go without. By default there is room for all. In evaluation
        a limit makes answers rest on what comes beside a token, so pieces of a text no longer answer as the whole.
    router_jitter_noise (`float`):
        By how much the input of a `switch` router varies in training.
    router_aux_loss_coef, router_z_loss_coef (`float`), output_router_logits (`bool`):
        Weights of the loss that keeps experts equally busy, and of that which keeps the logits of routers small;
        whether the model answers with the logits and choices of its routers, and adds those losses.
    """

    num_local_experts: int | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    expert_capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    router_jitter_noise: float | int = 0.0
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    output_router_logits: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether some feed-forward is sparse."""
        return not set(SPARSE).isdisjoint(self.feed_forward_types)

    def expert_ep_plan(self) -> dict[str, str]:
        """How experts are dealt out to the processes of an expert-parallel group."""
        plan = {}
        for kind in set(SPARSE) & set(self.feed_forward_types):
            plan |= EXPERT_PARALLEL[kind]
        return plan

    def validate_experts(self):
        """Raise ValueError where the experts' fields contradict each other or the types of the feed-forwards."""
        experts = self.num_local_experts
        if self.has_experts and experts is None:
            sparse = ", ".join(kind for kind in SPARSE if kind in self.feed_forward_types)
            raise ValueError(f"Feed-forwards of type {sparse} need num_local_experts: how many experts they have.")
        if self.output_router_logits and not self.has_experts:
            raise ValueError("output_router_logits asks for routers, but no feed-forward is sparse.")
        if experts is None:
            return
        if not self.has_experts:
            raise ValueError(
                f"num_local_experts is {experts}, but no feed-forward is sparse: name some in feed_forward_types."
            )
        if not 1 <= self.num_experts_per_tok <= experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_local_experts {experts}."
            )
        if self.moe_intermediate_size is not None and self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size is {self.moe_intermediate_size}; it must be at least 1.")
        for name in ("expert_capacity_factor", "eval_capacity_factor"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive, or None for room for all.")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"router_jitter_noise is {self.router_jitter_noise}; it must be at least 0 and below 1.")
        if self.mlp_bias:
            raise ValueError("Experts have no bias: mlp_bias must be false where a feed-forward is sparse.")


# What is said of experts, and left unsaid where there are none
EXPERT_FIELDS = tuple(ExpertConfig.__annotations__)
