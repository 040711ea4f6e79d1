"""The fields that every architecture has; each adds only those that are its own."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from .expert_config import EXPERT_FIELDS, SPARSE, TENSOR_PARALLEL_EXPERTS, ExpertConfig

# How the parts of a feed-forward are split over the processes of a tensor-parallel group, by its kind
TENSOR_PARALLEL = {
    "gated": {
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    },
    "dense": {"layers.*.feed_forward.up_proj": "colwise", "layers.*.feed_forward.down_proj": "rowwise"},
    "rwkv4_channel_mixing": {
        "layers.*.feed_forward.key": "colwise",
        "layers.*.feed_forward.value": "rowwise",
    },
    "rwkv7_channel_mixing": {
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    },
    **TENSOR_PARALLEL_EXPERTS,
}


@strict
class ArchConfig(ExpertConfig):
    """
    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (`int`):
        Sizes, as everywhere in transformers. `intermediate_size` is the width inside a feed-forward.
    layer_types, feed_forward_types (`list[str]`, *optional*):
        The mixer and the feed-forward of each layer; by default the architecture's own pattern, repeated.
    hidden_act (`str`):
        Activation of the feed-forwards, a name that transformers' `ACT2FN` knows.
    norm_eps, initializer_range, hidden_dropout, attention_dropout (`float`):
        Epsilon of the norms, deviation of the initial weights, dropout after embeddings and sub-layers, and of
        attention weights.
    attention_bias, mlp_bias (`bool`):
        Whether the projections of mixers, and those of feed-forwards, have a bias.
    embedding_norm (`bool`), type_vocab_size (`int`):
        Whether embeddings are normed; how many kinds of segment have an embedding of their own (0: none).
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {}  # of the mixers; that of the feed-forwards in use is added
    layer_kinds: ClassVar[tuple[str, ...]] = ("full_attention",)  # what `layer_types` may name, the default first
    feed_forward_kinds: ClassVar[tuple[str, ...]] = ("gated", "dense", *SPARSE)
    pooling: ClassVar[str] = "last"  # what speaks for a text: a decoder's last token, an encoder's first, or "document"

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    layer_types: list[str] | None = None
    feed_forward_types: list[str] | None = None
    hidden_act: str = "silu"
    norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_norm: bool = False
    type_vocab_size: int = 0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        self.layer_types = kwargs.pop("mixer_types", self.layer_types)
        if self.layer_types is None:
            self.layer_types = self.repeated(self.layer_pattern())
        if self.feed_forward_types is None:
            self.feed_forward_types = self.repeated(self.feed_forward_pattern())
        self.base_model_tp_plan = self.stack_tp_plan()
        if self.has_experts:
            self.base_model_ep_plan = self.expert_ep_plan()
        else:
            self.router_aux_loss_coef = 0.0  # by which trl knows that there are no routers to ask
        super().__post_init__(**kwargs)

    def mixer_tp_plan(self) -> dict[str, str]:
        """How the projections of mixers are split over the processes of a tensor-parallel group."""
        return type(self).base_model_tp_plan

    def stack_tp_plan(self) -> dict[str, str]:
        """The same of a whole stack: of its mixers, and of the feed-forwards in use."""
        plan = dict(self.mixer_tp_plan())
        for kind in self.feed_forward_types:
            if not (self.separate_experts and kind in SPARSE):
                plan |= TENSOR_PARALLEL.get(kind, {})
        return plan

    def to_dict(self) -> dict:
        """As in transformers, with `layer_types` under the name `mixer_types`: a resumed Trainer reads config.json as a
        plain PreTrainedConfig, which raises for layer types other than transformers' own. What is said of experts is
        left out where there are none."""
        unsaid = ("base_model_ep_plan", *(() if self.has_experts else EXPERT_FIELDS))
        return {
            "mixer_types" if name == "layer_types" else name: value
            for name, value in super().to_dict().items()
            if name not in unsaid
        }

    def layer_pattern(self) -> list[str]:
        """The layer types of one period, repeated down the stack."""
        return [self.layer_kinds[0]]

    def feed_forward_pattern(self) -> list[str]:
        return [self.feed_forward_kinds[0]]

    def repeated(self, pattern: list[str]) -> list[str]:
        return [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]

    @property
    def output_size(self) -> int:
        """The width of what the stack answers, and its heads read."""
        return self.hidden_size

    @property
    def layer_groups(self) -> list[int]:
        """The set of parameters that each layer uses: its own, unless layers share."""
        return list(range(self.num_hidden_layers))

    def validate_layer_type(self):
        """transformers would compare with a fixed list of layer types; ours are `layer_kinds`, checked below."""

    def validate_architecture(self):
        """Sizes and kinds that fit together. An architecture calls this first, then checks what is its own."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hidden_size % self.num_attention_heads and getattr(self, "head_dim", None) is None:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not in the vocabulary of {self.vocab_size}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown; there are {', '.join(sorted(ACT2FN))}.")
        for name, kinds in (("layer_types", self.layer_kinds), ("feed_forward_types", self.feed_forward_kinds)):
            types = getattr(self, name)
            if unknown := sorted(set(types) - set(kinds)):
                raise ValueError(f"{name} has {', '.join(unknown)}; {self.model_type} knows {', '.join(kinds)}.")
            if len(types) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(types)} entries for {self.num_hidden_layers} layers.")
        self.validate_experts()


@strict
class AttentionConfig(ArchConfig):
    """What softmax attention with rotary positions asks beside `ArchConfig`.

    num_key_value_heads, head_dim (`int`, *optional*):
        Key and value heads that groups of query heads share (1: multi-query); the width of a head.
    sliding_window (`int`, *optional*):
        How many tokens a layer of type `"sliding_attention"` sees, itself included.
    rope_parameters (`dict`, *optional*):
        As everywhere in transformers: `rope_type` default, linear, dynamic, yarn, llama3, longrope, and its numbers.
    """

    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
    }
    layer_kinds = ("full_attention", "sliding_attention")

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    rope_parameters: RopeParameters | dict | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def turns_pairs(self) -> bool:
        """Whether positions are rotations of pairs of numbers within a head."""
        return True

    def validate_architecture(self):
        super().validate_architecture()
        if "sliding_attention" in self.layer_types and not (self.sliding_window and self.sliding_window > 0):
            raise ValueError("Layers of type sliding_attention need a positive sliding_window.")
        heads = self.num_key_value_heads or self.num_attention_heads
        if heads < 1 or self.num_attention_heads % heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {heads}."
            )
        if self.turns_pairs and (self.head_dim or self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError("Rotary positions turn pairs: the width of a head must be even.")

    def validate_rope(self):
        """Also refuses what transformers only warns of, to fail at the first call."""
        rope, kinds = self.rope_parameters, ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
        if rope.get("rope_type") not in kinds:
            raise ValueError(f"rope_type {rope.get('rope_type')!r} is unknown; there are {', '.join(kinds)}.")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor must be 1: rotations turn whole heads.")
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error
        for name in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
            if self.head_dim and len(rope[name]) != self.head_dim // 2:
                raise ValueError(f"{name} has {len(rope[name])} numbers for the {self.head_dim // 2} pairs of a head.")


@strict
class SinkAttentionConfig(AttentionConfig):
    """What layers of type `"sink_attention"` ask beside it.

    num_sink_tokens (`int`, defaults to 4):
        The first tokens of a text, which all later ones see beside the last `sliding_window`.
    """

    num_sink_tokens: int = 4

    def causal_window(self, layer_idx: int) -> tuple[int, int, int]:
        """What such a layer sees: window, dilation, first tokens."""
        return self.sliding_window, 1, self.num_sink_tokens

    def validate_architecture(self):
        super().validate_architecture()
        if "sink_attention" in self.layer_types and not (self.sliding_window and self.sliding_window > 1):
            raise ValueError("Layers of type sink_attention need a sliding_window of at least 2.")
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens is {self.num_sink_tokens}; it must not be negative.")
