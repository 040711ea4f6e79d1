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
    separate_experts (`bool`):
        Whether experts are modules, as weights are quantised and `hf_arch.compress.quantize` makes them, in place of
        one tensor for all. The answers are the same; slower, and not dealt to processes.
    num_expert_groups, num_groups_per_tok (`int`, *optional*):
        Of `hierarchical` feed-forwards: how many groups their experts are dealt to, and how many of these a token
        takes, with as many experts of each.
    expert_token_share (`float`, *optional*):
        Which share of the real tokens of a document an expert of an `expert_choice` feed-forward takes, rounded up to
        whole tokens; by default num_experts_per_tok / num_local_experts, so that this is what a token has on average.
    slots_per_expert (`int`):
        How many means of the tokens of a document each expert of a `soft` feed-forward is given.
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

    attribute_map = {"num_experts": "num_local_experts"}  # as of transformers' Mixtral: tools ask for either

    num_local_experts: int | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    separate_experts: bool = False
    num_expert_groups: int | None = None
    num_groups_per_tok: int = 1
    expert_token_share: float | int | None = None
    slots_per_expert: int = 1
    expert_capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    router_jitter_noise: float | int = 0.0
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    output_router_logits: bool = False

    @property
    def feed_forwards_in_use(self) -> set[str]:
        """The types of all feed-forwards of the model."""
        return set(self.feed_forward_types)

    @property
    def has_experts(self) -> bool:
        """Whether some feed-forward is sparse."""
        return not self.feed_forwards_in_use.isdisjoint(SPARSE)

    @property
    def token_share(self) -> float:
        """`expert_token_share`, or what it is by default."""
        default = self.num_experts_per_tok / self.num_local_experts
        return default if self.expert_token_share is None else self.expert_token_share

    def expert_ep_plan(self) -> dict[str, str]:
        """How experts are dealt out to the processes of an expert-parallel group."""
        plan = {}
        if self.separate_experts:
            return plan
        for kind in self.feed_forwards_in_use & set(SPARSE):
            plan |= EXPERT_PARALLEL[kind]
        return plan

    def validate_experts(self):
        """Raise ValueError where the experts' fields contradict each other or the types of the feed-forwards."""
        experts, kinds = self.num_local_experts, [kind for kind in SPARSE if kind in self.feed_forwards_in_use]
        if kinds and experts is None:
            raise ValueError(
                f"Feed-forwards of type {', '.join(kinds)} need num_local_experts: how many experts they have."
            )
        if self.output_router_logits and not any(SPARSE_FEED_FORWARDS[kind].routes for kind in kinds):
            missing = "those of type soft choose nothing" if kinds else "no feed-forward is sparse"
            raise ValueError(f"output_router_logits asks for routers, but {missing}.")
        self.check_directions()
        if experts is None:
            return
        if not kinds:
            raise ValueError(
                f"num_local_experts is {experts}, but no feed-forward is sparse: name some in feed_forward_types."
            )
        if not 1 <= self.num_experts_per_tok <= experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_local_experts {experts}."
            )
        if self.moe_intermediate_size is not None and self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size is {self.moe_intermediate_size}; it must be at least 1.")
        if self.mlp_bias:
            raise ValueError("Experts have no bias: mlp_bias must be false where a feed-forward is sparse.")
        self.check_expert_groups()
        self.check_routing()

    def check_directions(self):
        kinds = [kind for kind in SPARSE if kind in self.feed_forward_types and SPARSE_FEED_FORWARDS[kind].sees_all]
        if kinds and self.pooling == "last":
            blind = ", ".join(kind for kind in SPARSE if not SPARSE_FEED_FORWARDS[kind].sees_all)
            raise ValueError(
                f"Feed-forwards of type {', '.join(kinds)} compare all tokens of a text before they answer one: in a "
                f"causal model each would be told of later ones. Take them in an encoder, or one of {blind}."
            )

    def check_expert_groups(self):
        groups, taken, experts = self.num_expert_groups, self.num_groups_per_tok, self.num_local_experts
        if "hierarchical" in self.feed_forwards_in_use and groups is None:
            raise ValueError(
                "Feed-forwards of type hierarchical need num_expert_groups: how many groups experts are in."
            )
        if groups is None:
            return
        if groups < 1 or experts % groups:
            raise ValueError(f"num_local_experts {experts} cannot be dealt to num_expert_groups {groups} alike.")
        if not 1 <= taken <= groups:
            raise ValueError(f"num_groups_per_tok {taken} is not between 1 and num_expert_groups {groups}.")
        if self.num_experts_per_tok % taken or self.num_experts_per_tok // taken > experts // groups:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be num_groups_per_tok {taken} times 1 to "
                f"{experts // groups}, the experts of a group: a token takes as many of each group."
            )

    def check_routing(self):
        for name in ("expert_capacity_factor", "eval_capacity_factor"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive, or None for room for all.")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"router_jitter_noise is {self.router_jitter_noise}; it must be at least 0 and below 1.")
        if not 0 < self.token_share <= 1:
            raise ValueError(f"expert_token_share is {self.expert_token_share}; it must be over 0, and at most 1.")
        if self.slots_per_expert < 1:
            raise ValueError(f"slots_per_expert is {self.slots_per_expert}; it must be at least 1.")


# What is said of experts, and left unsaid where there are none
EXPERT_FIELDS = tuple(ExpertConfig.__annotations__)
