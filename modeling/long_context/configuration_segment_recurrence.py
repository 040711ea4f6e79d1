"""What architectures have in common whose layers also see what they saw a segment ago."""

from huggingface_hub.dataclasses import strict

from ..ops.segment_rows import Window
from ..skeleton.config import ArchConfig
from ..skeleton.expert_config import SPARSE


@strict
class SegmentRecurrenceConfig(ArchConfig):
    """
    segment_length (`int`, defaults to 512):
        Tokens of a segment, counted from the beginning of a document. In training, gradients stop at its start.
    memory_length (`int`, defaults to 512):
        Tokens before its segment that a token sees in each layer.
    clamp_length (`int`, *optional*):
        The distance from which on all distances count as this one.
    head_dim (`int`, *optional*):
        Width of a head, by default `hidden_size / num_attention_heads`.
    untie_biases (`bool`, defaults to `True`):
        Whether each layer has the two biases of its queries, u and v, for itself, or all share them.
    embedding_size (`int`, *optional*), cutoffs (`list[int]`, *optional*), div_val (`int`, defaults to 1):
        Width of the embeddings, by default `hidden_size`; the ids at which further clusters of rarer words begin, and
        how many times narrower the embeddings of each are than those of the one before. With `cutoffs`, logits are
        logarithms of probabilities.
    tie_projections (`list[bool]`, *optional*):
        Where words are tied (`tie_word_embeddings`) and projected: the clusters whose projections are tied, too; by
        default all.
    residual_type (`str`, defaults to `"post_norm"`):
        `"post_norm"`, or `"pre_norm"`, as in the original without a norm at the end.
    """

    feed_forward_kinds = ("dense", "gated", *SPARSE)

    segment_length: int = 512
    memory_length: int = 512
    clamp_length: int | None = None
    head_dim: int | None = None
    untie_biases: bool = True
    embedding_size: int | None = None
    cutoffs: list[int] | None = None
    div_val: int = 1
    tie_projections: list[bool] | None = None
    residual_type: str = "post_norm"
    hidden_act: str = "relu"
    mlp_bias: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def window(self) -> Window:
        return Window(self.segment_length, self.memory_length)

    @property
    def span(self) -> int:
        """The keys that the queries of a segment see, all together."""
        return self.window.span

    @property
    def adaptive(self) -> bool:
        """Whether the vocabulary is cut, or its embeddings are projected."""
        return bool(self.cutoffs) or self.embedding_size != self.hidden_size

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("segment_length", "memory_length", "head_dim", "clamp_length", "embedding_size", "div_val"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.residual_type not in ("post_norm", "pre_norm"):
            raise ValueError(f"residual_type {self.residual_type!r} is unknown; there are post_norm, pre_norm.")
        ends = [0, *(self.cutoffs or []), self.vocab_size]
        if any(after <= before for before, after in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"cutoffs {self.cutoffs} must grow, between 0 and vocab_size {self.vocab_size}.")
        if self.embedding_size < self.div_val ** (len(ends) - 2):
            raise ValueError(
                f"embedding_size {self.embedding_size} cannot be divided by div_val {self.div_val} for each of the "
                f"{len(ends) - 2} cutoffs."
            )
        if self.tie_projections is not None and len(self.tie_projections) != len(ends) - 1:
            raise ValueError(f"tie_projections has {len(self.tie_projections)} entries for {len(ends) - 1} clusters.")
