"""A Performer that begins with the weights of a Transformer, whose attention its features estimate: Llama's, GPT-2's or
BERT's."""

from collections.abc import Callable
from dataclasses import replace

from ...dense.transformer import conversion_transformer
from ...skeleton.conversion import WARM_START, Fields


def estimating(config: Callable[[Fields], Fields]) -> Callable[..., Fields]:
    """The same fields, where a Transformer's default is not ours, too, and what a Performer adds."""

    def performer_config(fields: Fields, **choices) -> Fields:
        fields = config(fields)
        return {"feed_forward_types": ["gated"] * fields["num_hidden_layers"]} | fields | choices

    return performer_config


CONVERSIONS = tuple(
    replace(
        conversion,
        config=estimating(conversion.config),
        choices=("kernel_type", "num_features", "feature_redraw_interval", "kernel_epsilon"),
        fresh=r".*\.mixer\.features\.\w+",
        original=WARM_START,
    )
    for conversion in conversion_transformer.CONVERSIONS
)
