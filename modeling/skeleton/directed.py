"""The config of architectures that are decoders and encoders alike."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from .config import ArchConfig


@strict
class DirectedConfig(ArchConfig):
    """
    direction (`str`):
        `"causal"`, a decoder, or `"bidirectional"`, an encoder.
    """

    # What the layers of a direction may be, the default first; by default any of `layer_kinds`
    layer_kinds_of: ClassVar[dict[str, tuple[str, ...]]] = {}

    direction: Literal["causal", "bidirectional"] = "causal"

    def __post_init__(self, **kwargs):
        if self.direction == "bidirectional":
            self.use_cache = False
        super().__post_init__(**kwargs)

    @property
    def directed_kinds(self) -> tuple[str, ...]:
        """What layers of this direction may be."""
        return self.layer_kinds_of.get(self.direction, self.layer_kinds)

    def layer_pattern(self) -> list[str]:
        return [self.directed_kinds[0]]

    @property
    def pooling(self) -> str:
        return "first" if self.direction == "bidirectional" else "last"

    def validate_architecture(self):
        super().validate_architecture()
        if wrong := sorted(set(self.layer_types) - set(self.directed_kinds)):
            kinds = ", ".join(self.directed_kinds)
            raise ValueError(f"direction {self.direction!r} has layers of type {kinds}, not {', '.join(wrong)}.")
