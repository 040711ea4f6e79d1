"""The fields that every architecture has; each adds only those that are its own."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig


@strict
class ArchConfig(PreTrainedConfig):
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
    base_model_tp_plan = {
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    }
    layer_kinds: ClassVar[tuple[str, ...]] = ("full_attention",)  # what `layer_types` may name, the default first
    feed_forward_kinds: ClassVar[tuple[str, ...]] = ("gated", "dense")
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
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """As in transformers, with `layer_types` under the name `mixer_types`: a resumed Trainer reads config.json as a
        plain PreTrainedConfig, which raises for layer types other than transformers' own."""
        return {"mixer_types" if name == "layer_types" else name: value for name, value in super().to_dict().items()}

    def layer_pattern(self) -> list[str]:
        """The layer types of one period, repeated down the stack."""
        return [self.layer_kinds[0]]

    def feed_forward_pattern(self) -> list[str]:
        return [self.feed_forward_kinds[0]]

    def repeated(self, pattern: list[str]) -> list[str]:
        return [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]

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
