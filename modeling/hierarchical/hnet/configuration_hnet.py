"""H-Net (Hwang et al., 2025, arXiv:2507.07955)."""

from huggingface_hub.dataclasses import strict

from ...skeleton.config import ArchConfig, AttentionConfig
from ...skeleton.hierarchy_config import AtLevel, HierarchyConfig
from ...state_space.ssd.configuration_ssd import ArchSSDConfig


@strict
class ArchHNetConfig(AttentionConfig, HierarchyConfig):
    """
    inner_hidden_sizes (`list[int]`, defaults to `[1536]`):
        The width of each level above tokens: one number for each stage that cuts a text into chunks. Widths may grow
        from level to level; `hidden_size` is that of tokens.
    inner_intermediate_sizes (`list[int]`, *optional*):
        The width inside feed-forwards of these levels; by default `intermediate_size`.
    target_ratios (`list[float]`, *optional*):
        How many items of a level the ratio loss asks a chunk to have, for each stage; by default 6 where there is one
        stage, else 3 (section 3.1 and appendix of the paper).
    ratio_loss_weight (`float`, defaults to 0.03):
        What the ratio loss is multiplied by where it is added to the loss: in training, with labels.
    layer_types, feed_forward_types (`list[str]`, *optional*):
        `"ssd"`, `"ragged_attention"` or `"causal_window_attention"`; `"none"` or `"gated"` (and what else feeds
        forward). By default recurrences alone beside the last level, and attention with feed-forwards in it.
    sliding_window (`int`, defaults to 1024):
        How many items of its level a layer of type `"causal_window_attention"` sees, itself included.
    rotary_share (`float`, defaults to 0.5):
        The share of the numbers of a head that positions turn, the first ones.
    state_size, state_head_dim, conv_kernel (`int`), expand (`float`):
        Of layers of type `"ssd"`: numbers in the state for each of the values, the width of a head, how many items the
        short convolution sees, and the width inside over that of the level.
    """

    model_type = "hf_arch_hnet"
    layer_kinds = ("ssd", "ragged_attention", "causal_window_attention")
    feed_forward_kinds = ("none", *ArchConfig.feed_forward_kinds)

    vocab_size: int = 256
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 30
    num_attention_heads: int = 16
    inner_hidden_sizes: list[int] | None = None
    inner_intermediate_sizes: list[int] | None = None
    target_ratios: list[float | int] | None = None
    ratio_loss_weight: float | int = 0.03
    sliding_window: int | None = 1024
    rotary_share: float | int = 0.5
    state_size: int = 128
    state_head_dim: int = 64
    conv_kernel: int = 4
    expand: float | int = 2.0
    norm_eps: float = 1e-5
    bos_token_id: int | None = 254
    eos_token_id: int | list[int] | None = 255

    def __post_init__(self, **kwargs):
        if self.inner_hidden_sizes is None:
            self.inner_hidden_sizes = [1536]
        if self.inner_intermediate_sizes is None:
            self.inner_intermediate_sizes = [self.intermediate_size] * len(self.inner_hidden_sizes)
        if self.target_ratios is None:
            stages = len(self.inner_hidden_sizes)
            self.target_ratios = [6.0 if stages == 1 else 3.0] * stages
        super().__post_init__(**kwargs)

    @property
    def num_levels(self) -> int:
        return len(self.inner_hidden_sizes) + 1

    @property
    def sizes(self) -> list[int]:
        """The width of each level."""
        return [self.hidden_size, *self.inner_hidden_sizes]

    @property
    def rotary_dim(self) -> int:
        """The numbers of a head that positions turn, at the level of tokens."""
        return round(self.head_dim * self.rotary_share)

    def layer_pattern(self) -> list[str]:
        last = self.num_levels - 1
        return ["ragged_attention" if level == last else "ssd" for level in self.layer_levels] or ["ssd"]

    def feed_forward_pattern(self) -> list[str]:
        last = self.num_levels - 1
        return ["gated" if level == last else "none" for level in self.layer_levels] or ["none"]

    def mixer_tp_plan(self) -> dict[str, str]:
        """Plans name modules of all layers alike, so that there is none where some are not attention."""
        return {} if "ssd" in self.layer_types else super().mixer_tp_plan()

    def at_level(self, level: int) -> AtLevel:
        size = self.sizes[level]
        inside = [self.intermediate_size, *self.inner_intermediate_sizes][level]
        head_dim = size // self.num_attention_heads
        rotary_dim = round(head_dim * self.rotary_share)
        return AtLevel(self, hidden_size=size, intermediate_size=inside, head_dim=head_dim, rotary_dim=rotary_dim)

    def of_recurrence(self, size: int) -> ArchSSDConfig:
        """What an SSD layer of a level of the width `size` is built from."""
        return ArchSSDConfig(
            hidden_size=size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=round(self.expand * size) // self.state_head_dim,
            expand=self.expand,
            state_size=self.state_size,
            conv_kernel=self.conv_kernel,
            attention_bias=self.attention_bias,
            norm_eps=self.norm_eps,
        )

    def validate_architecture(self):
        if not self.inner_hidden_sizes:
            raise ValueError("inner_hidden_sizes is empty: a model that chunks nothing is a stack of layers.")
        super().validate_architecture()
        for name in ("inner_intermediate_sizes", "target_ratios"):
            if len(getattr(self, name)) != self.num_levels - 1:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.num_levels - 1} stages.")
        if wrong := [ratio for ratio in self.target_ratios if ratio <= 1]:
            raise ValueError(f"target_ratios has {wrong[0]}: a chunk has more than one item.")
        if self.sizes != sorted(self.sizes):
            raise ValueError(f"The widths are {self.sizes} from level to level: they may grow, not shrink.")
        for size in self.sizes:
            self.check_width(size)
        if self.head_dim != self.hidden_size // self.num_attention_heads:
            raise ValueError("The width of a head is that of its level over num_attention_heads: leave head_dim out.")
        if self.rope_parameters.get("rope_type") == "longrope":
            raise ValueError("rope_type longrope has numbers for heads of one width; those of levels differ.")

    def check_width(self, size: int) -> None:
        heads, head_dim = self.num_attention_heads, size // self.num_attention_heads
        if size % heads:
            raise ValueError(f"The width {size} of a level is not a multiple of num_attention_heads {heads}.")
        if not 0 < self.rotary_share <= 1 or round(head_dim * self.rotary_share) % 2:
            raise ValueError(
                f"rotary_share {self.rotary_share} of a head of {head_dim} is no even number: positions turn pairs."
            )
        if self.state_head_dim < 1 or round(self.expand * size) % self.state_head_dim:
            raise ValueError(
                f"expand {self.expand} x {size} is not a multiple of state_head_dim {self.state_head_dim}."
            )
        self.of_recurrence(size)
