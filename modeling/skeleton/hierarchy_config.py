"""Configs of hierarchies of whole stacks."""

from huggingface_hub.dataclasses import strict

from .config import ArchConfig


class AtLevel:
    """A config as the layers of one level see it: the model's own, with other `sizes`."""

    def __init__(self, config: ArchConfig, **sizes):
        vars(self).update(sizes, config=config)

    def __getattr__(self, name: str):
        if name == "config":  # of a copy that is only being made
            raise AttributeError(name)
        return getattr(self.config, name)


@strict
class HierarchyConfig(ArchConfig):
    """
    layer_levels (`list[int]`, *optional*):
        The level that each layer works at, in order: 0 is that of tokens, items of each further one are made of those
        of the one below. Levels rise to the last and fall back: `[0, 0, 1, 1, 1, 0, 0]`. `layer_types` and
        `feed_forward_types` name the same layers in the same order.
    """

    layer_levels: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.layer_levels is None:
            self.layer_levels = self.level_pattern()
        super().__post_init__(**kwargs)

    @property
    def num_levels(self) -> int:
        """How many there are, by what else the config says."""
        raise NotImplementedError

    def level_pattern(self) -> list[int]:
        """Where there are layers enough, as many before and after at each level but the last, which has the most."""
        stages = self.num_levels - 1
        beside = max(1, self.num_hidden_layers // (2 * stages + 4))
        rising = [level for level in range(stages) for _ in range(beside)][: self.num_hidden_layers - 1]
        falling = [level for level in reversed(range(stages)) for _ in range(beside)]
        falling = falling[max(0, len(falling) + len(rising) + 1 - self.num_hidden_layers) :]
        return rising + [stages] * (self.num_hidden_layers - len(rising) - len(falling)) + falling

    @property
    def parts(self) -> list[range]:
        """The layers of each part in order: before the next level at each, of the last, and after at each."""
        top, found, start = self.num_levels - 1, [], 0
        for level in (*range(top + 1), *reversed(range(top))):
            stop = start
            while stop < self.num_hidden_layers and self.layer_levels[stop] == level:
                stop += 1
            found.append(range(start, stop))
            start = stop
        return found

    def causal_window(self, layer_idx: int) -> tuple[int, int, int]:
        """What a layer of type `"causal_window_attention"` sees: window, dilation, first tokens."""
        return self.sliding_window, 1, 0

    def at_level(self, level: int) -> "ArchConfig | AtLevel":
        """What the layers of a level are built from."""
        return self

    def validate_architecture(self):
        super().validate_architecture()
        levels, top = self.layer_levels, self.num_levels - 1
        if len(levels) != self.num_hidden_layers:
            raise ValueError(f"layer_levels has {len(levels)} entries for {self.num_hidden_layers} layers.")
        if wrong := [level for level in levels if not 0 <= level <= top]:
            raise ValueError(f"layer_levels has {wrong[0]}; the model has the levels 0 to {top}.")
        if top not in levels:
            raise ValueError(f"No layer works at level {top}, the last: name it in layer_levels.")
        middle = levels.index(top)
        if levels[:middle] != sorted(levels[:middle]) or levels[middle:] != sorted(levels[middle:], reverse=True):
            raise ValueError(f"layer_levels are {levels}: they rise to the last level, and fall back.")
        if "causal_window_attention" in self.layer_types and not (self.sliding_window and self.sliding_window > 1):
            raise ValueError("Layers of type causal_window_attention need a sliding_window of at least 2.")
