"""Routing Transformer (Roy et al., 2020, arXiv:2003.05997)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import RopeParameters

from ...skeleton.directed import DirectedConfig
from ...skeleton.expert_config import SPARSE


@strict
class ArchRoutingTransformerConfig(DirectedConfig):
    """
    direction (`str`, defaults to `"causal"`):
        `"causal"`: a token joins the cluster whose centroid is nearest to it, and sees those before it that did, which
        no later token changes. `"bidirectional"`: as in the paper, each cluster takes the `cluster_size` tokens nearest
        to its centroid, of all in the text, so that clusters are of equal size and a token may be in several or none.
    num_clusters (`int`, defaults to 32), cluster_size (`int`, defaults to 128):
        Clusters of a routed head, and how many tokens one sees in its cluster: at most, and at least half as many if
        there are so many. A token is compared with the centroids and with those it sees: for texts of n tokens choose
        clusters that hold them between them, num_clusters x cluster_size = n, and about sqrt(n) clusters, at which the
        cost is least, n^1.5 in all. Its memory holds as many tokens of each head, however long the text.
    num_local_heads (`int` or `list[int]`, *optional*):
        Of the heads of a layer, those that see what is near instead: half by default. One number, or one for each
        layer; the paper routes in few layers where texts are long.
    local_window (`int`, defaults to 256):
        How many tokens a local head sees: those of its block of half as many, and those of the block before; of an
        encoder, also those of the block after.
    centroid_decay (`float`, defaults to 0.999):
        How much of a centroid stays at each step of training; less at the first ones, which begin from nothing.
    routed_norm (`str`, defaults to `"layer_norm"`):
        What brings the queries and keys of routed heads to one length: `"layer_norm"`, without a scale of its own, as
        in the paper; `"unit"`, to length 1 to find clusters, and, of queries that are keys too, as keys.
    rotary_routed (`bool`, defaults to `False`):
        Whether routed heads turn their queries, keys and values by positions too, before they find clusters: without,
        they go by content alone, and local heads tell positions.
    head_dim (`int`, *optional*):
        Width of a head, by default `hidden_size / num_attention_heads`.
    rope_parameters (`dict`, *optional*):
        `rope_theta` (defaults to 10000.0), the slowest rotation, in tokens per radian.
    """

    model_type = "hf_arch_routing_transformer"
    layer_kinds = ("routing", "bidirectional_routing")
    layer_kinds_of = {"causal": ("routing",), "bidirectional": ("bidirectional_routing",)}
    feed_forward_kinds = ("dense", "gated", *SPARSE)

    num_clusters: int = 32
    cluster_size: int = 128
    num_local_heads: int | list[int] | None = None
    local_window: int = 256
    centroid_decay: float | int = 0.999
    routed_norm: Literal["layer_norm", "unit"] = "layer_norm"
    rotary_routed: bool = False
    head_dim: int | None = None
    rope_parameters: RopeParameters | dict | None = None
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_local_heads is None:
            self.num_local_heads = self.num_attention_heads // 2
        super().__post_init__(**kwargs)

    def local_heads(self, layer_idx: int) -> int:
        """How many heads of a layer are local; they come first."""
        heads = self.num_local_heads
        return heads if isinstance(heads, int) else heads[layer_idx]

    def validate_architecture(self):
        super().validate_architecture()
        for name, least in (("num_clusters", 1), ("cluster_size", 2), ("local_window", 2), ("head_dim", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("local_window",) if self.direction == "bidirectional" else ("local_window", "cluster_size"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name} is {getattr(self, name)}: it is that of two blocks, so it must be even.")
        if not 0 <= self.centroid_decay <= 1:
            raise ValueError(f"centroid_decay is {self.centroid_decay}; it must be between 0 and 1.")
        if self.head_dim % 2:
            raise ValueError(f"Rotary positions turn pairs: head_dim {self.head_dim} must be even.")
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(
                f"What is near needs no scaled rotations: rope_type is {self.rope_parameters['rope_type']!r}, not "
                "default."
            )
        self.validate_local_heads()

    def validate_local_heads(self):
        heads = self.num_local_heads
        if isinstance(heads, list) and len(heads) != self.num_hidden_layers:
            raise ValueError(f"num_local_heads has {len(heads)} entries for {self.num_hidden_layers} layers.")
        for number in [heads] if isinstance(heads, int) else heads:
            if not 0 <= number <= self.num_attention_heads:
                raise ValueError(
                    f"num_local_heads has {number}; it must be between 0 and num_attention_heads "
                    f"{self.num_attention_heads}."
                )
