"""Checkpoints of Longformer (allenai/longformer-base-4096), and warm starts from RoBERTa.

A warm start is the paper's (section 5): the table of positions is written down again and again until it is long enough,
and the projections of global tokens begin as copies of the others.
"""

import re
from collections.abc import Callable

import torch
from transformers import LongformerConfig, RobertaConfig

from ...hierarchical.hat.conversion_hat import ROBERTA_HEADS, encoder_config, encoder_rules
from ...skeleton.conversion import WARM_START, Conversion, Fields, Rule

GLOBAL = (r"attention\.self\.([qkv])(?:uery|ey|alue)_global\.(\w+)", r"mixer.\2_global_proj.\3")
POSITIONS = "model.embed_positions.embed_positions.weight"


def longformer_config(fields: Fields) -> Fields:
    shared = encoder_config(fields, LongformerConfig)
    layers = shared["num_hidden_layers"]
    dilation = fields.get("attention_dilation", [1] * layers)  # said by checkpoints of the first release
    return shared | {
        "max_position_embeddings": shared["max_position_embeddings"] - first_position(fields),
        "attention_window": LongformerConfig.from_dict(fields).attention_window,
        "attention_dilation": dilation,
        "sep_token_id": fields.get("sep_token_id", 2),
    }


def first_position(fields: Fields) -> int:
    """The row of the original's table that the first token takes."""
    return fields.get("pad_token_id", 1) + 1


def warm_config(
    fields: Fields,
    attention_window: int | list[int] = 512,
    attention_dilation: int | list[int] = 1,
    max_position_embeddings: int = 4096,
) -> Fields:
    windows = {"attention_window": attention_window, "attention_dilation": attention_dilation}
    longer = {"max_position_embeddings": max_position_embeddings}
    return encoder_config(fields, RobertaConfig) | windows | longer


def after_padding(table: torch.Tensor, config) -> torch.Tensor:
    return table[config.pad_token_id + 1 :]


def written_again(table: torch.Tensor, config) -> torch.Tensor:
    """The table, repeated until it is long enough, so that all but the seams looks as it did."""
    known = after_padding(table, config)
    times = -(-config.max_position_embeddings // len(known))
    return known.repeat(times, 1)[: config.max_position_embeddings]


def same_layer(ours: str) -> str:
    return rf"model.layers.\1.{ours}"


def also_global(ours: str) -> Callable:
    """The names of a part in our layers, and those of the same for global tokens, where it is such a projection."""

    def targets(match: re.Match, config) -> list[str]:
        name = match.expand(same_layer(ours))
        return list(dict.fromkeys((name, re.sub(r"mixer\.([qkv])_proj", r"mixer.\1_global_proj", name))))

    return targets


def position_rule(prefix: str, change: Callable) -> Rule:
    return Rule(rf"(?:{prefix}\.)?embeddings\.position_embeddings\.weight", POSITIONS, change=change)


LONGFORMER = Conversion(
    model_type="longformer",
    config=longformer_config,
    heads={
        "LongformerForMaskedLM": "ForMaskedLM",
        "LongformerModel": "Model",
        "LongformerForSequenceClassification": "ForSequenceClassification",
        "LongformerForTokenClassification": "ForTokenClassification",
        "LongformerForQuestionAnswering": "ForQuestionAnswering",
        "LongformerForMultipleChoice": "ForMultipleChoice",
    },
    default_head="ForMaskedLM",
    rules=(
        *encoder_rules("longformer", same_layer, position_rule("longformer", after_padding)),
        Rule(rf"(?:longformer\.)?encoder\.layer\.(\d+)\.{GLOBAL[0]}", same_layer(GLOBAL[1])),
        *ROBERTA_HEADS,
        Rule(r"(qa_outputs\.\w+)", r"\1"),
    ),
)

ROBERTA = Conversion(
    model_type="roberta",
    config=warm_config,
    choices=("attention_window", "attention_dilation", "max_position_embeddings"),
    heads={
        "RobertaForMaskedLM": "ForMaskedLM",
        "RobertaModel": "Model",
        "RobertaForSequenceClassification": "ForSequenceClassification",
        "RobertaForTokenClassification": "ForTokenClassification",
        "RobertaForQuestionAnswering": "ForQuestionAnswering",
        "RobertaForMultipleChoice": "ForMultipleChoice",
    },
    default_head="ForMaskedLM",
    original=WARM_START,
    rules=(
        *encoder_rules("roberta", also_global, position_rule("roberta", written_again)),
        *ROBERTA_HEADS,
        Rule(r"(qa_outputs\.\w+)", r"\1"),
    ),
)

CONVERSIONS = (LONGFORMER, ROBERTA)
