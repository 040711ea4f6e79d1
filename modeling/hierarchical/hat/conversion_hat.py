"""Checkpoints of the original HAT (kiddothe2b/hierarchical-transformer-base-4096), and warm starts from text encoders.

A warm start is the paper's (section 3.3): layers inside segments are those of the text encoder, one across segments is
a copy of the one before it, and the table of positions is cut to what a segment holds.
"""

import math
import re
from collections.abc import Callable

import torch
from transformers import BertConfig, RobertaConfig

from ...dense.transformer.conversion_transformer import BERT_LAYER, bert_config, weights_and_biases
from ...skeleton.conversion import WARM_START, Conversion, Fields, Rule, Tensors, refuse, require

KINDS = {"sentence_encoder": "level_0", "document_encoder": "level_1"}
OF_TRANSFORMER = ("direction", "residual_type", "norm_type", "position_type", "feed_forward_types")
CHOICES = ("segment_lengths", "layer_types", "max_position_embeddings")


def encoder_config(fields: Fields, original: type = BertConfig) -> Fields:
    require(fields, hidden_act="gelu")  # that of the head, whatever the layers have
    shared = bert_config(fields, original)
    return {name: value for name, value in shared.items() if name not in OF_TRANSFORMER}


def encoders(fields: Fields) -> list[tuple[str, str]]:
    """The original's encoders in the order in which they run, each with its kind."""
    layout = fields.get("encoder_layout")
    if not layout:
        raise ValueError("config.json has no encoder_layout, which says where the layers are.")
    found = [(number, name) for number in sorted(layout, key=int) for name in KINDS if layout[number].get(name)]
    return [(f"encoder.layer.{number}.{name}.", KINDS[name]) for number, name in found]


def segment_length(fields: Fields) -> int:
    return fields.get("max_sentence_length") or fields.get("max_sentence_size") or 128


def hat_config(fields: Fields) -> Fields:
    kinds = [kind for _, kind in encoders(fields)]
    length, segments = segment_length(fields), fields.get("max_sentences", 64)
    return encoder_config(fields) | {
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "segment_lengths": [length],
        "max_position_embeddings": segments * length,
    }


def in_order(tensors: Tensors, fields: Fields) -> Tensors:
    """Encoders under the number of their turn, and tables of positions without the rows that no position has."""
    turns = {name: f"encoder.layer.{turn}." for turn, (name, _) in enumerate(encoders(fields))}
    first, found = fields.get("pad_token_id", 0) + 1, {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(hi_transformer|hat)\.", "", name)
        if name == "embeddings.position_embeddings.weight":
            name, tensor = "levels.0", tensor[first : first + segment_length(fields)]
        elif match := re.fullmatch(r"encoder\.layer\.(\d+)\.position_embeddings\.weight", name):
            name, tensor = f"levels.1.{match[1]}", tensor[1:]  # one table, kept by each layer that uses it
        elif match := re.match(r"encoder\.layer\.\d+\.\w+_encoder\.", name):
            name = turns[match[0]] + name[match.end() :]
        found[name] = tensor
    return found


def default_layers(count: int, kinds: list[str]) -> list[str]:
    """One layer of each further level after every third, or the last, of `count` of level 0."""
    first, *others = kinds
    return [kind for i in range(1, count + 1) for kind in [first, *(others if i % min(3, count) == 0 else ())]]


def warm_config(original: type, first_position: Callable[[Fields], int]) -> Callable[..., Fields]:
    """`first_position` is the row of the original's table that its first token takes."""

    def config(
        fields: Fields,
        segment_lengths: list[int] | None = None,
        layer_types: list[str] | None = None,
        max_position_embeddings: int | None = None,
    ) -> Fields:
        shared = encoder_config(fields, original)
        lengths = [128] if segment_lengths is None else segment_lengths
        kinds = [f"level_{level}" for level in range(len(lengths) + 1)]
        layers = layer_types or default_layers(shared["num_hidden_layers"], kinds)
        known = shared["max_position_embeddings"] - first_position(fields)
        longest = max_position_embeddings or (32 * math.prod(lengths) if lengths else known)
        sizes = {"num_hidden_layers": len(layers), "max_position_embeddings": longest}
        return shared | sizes | {"layer_types": layers, "segment_lengths": lengths}

    return config


def taken_from(config) -> list[int]:
    """The layer of the text encoder that each layer begins with."""
    inside = [kind == "level_0" for kind in config.layer_types]
    return [max(0, sum(inside[: i + 1]) - 1) for i in range(len(inside))]


def copies(ours: str) -> Callable:
    def targets(match: re.Match, config) -> list[str]:
        taken = taken_from(config)
        return [match.expand(rf"model.layers.{i}.{ours}") for i, source in enumerate(taken) if source == int(match[1])]

    return targets


def tables(match: re.Match, config) -> list[str]:
    return [f"model.embed_positions.levels.{level}.weight" for level in range(len(config.level_lengths))]


def cut_tables(after_padding: bool) -> Callable:
    def cut(table: torch.Tensor, config) -> list[torch.Tensor]:
        first = config.pad_token_id + 1 if after_padding else 0
        return [table[first : first + length] for length in config.level_lengths]

    return cut


def encoder_rules(prefix: str, layer: Callable, *positions: Rule) -> tuple[Rule, ...]:
    """`layer` makes the target in our layers of what a part of theirs is called in ours."""
    begin = rf"(?:{prefix}\.)?"
    return (
        Rule(begin + r"embeddings\.(?:position_ids|token_type_ids)"),
        Rule(begin + r"embeddings\.word_embeddings\.weight", "model.embed_tokens.weight"),
        Rule(begin + r"embeddings\.token_type_embeddings\.weight", "model.embed_segments.weight"),
        Rule(begin + r"embeddings\.LayerNorm\.(\w+)", r"model.embed_norm.\1"),
        *positions,
        *(Rule(begin + rf"encoder\.layer\.(\d+)\.{theirs}", layer(ours)) for theirs, ours in BERT_LAYER),
        Rule(begin + r"pooler\.dense\.(\w+)", r"pooler.dense.\1"),
    )


def warm_positions(prefix: str, after_padding: bool) -> Rule:
    name = rf"(?:{prefix}\.)?embeddings\.position_embeddings\.weight"
    return Rule(name, tables, change=cut_tables(after_padding))


ROBERTA_HEADS = (
    Rule(r"lm_head\.dense\.(\w+)", r"lm_head.dense.\1"),
    Rule(r"lm_head\.layer_norm\.(\w+)", r"lm_head.norm.\1"),
    Rule(r"lm_head\.(?:decoder\.)?(weight|bias)", r"lm_head.decoder.\1"),
    Rule(r"classifier\.dense\.(\w+)", r"pooler.dense.\1"),
    Rule(r"classifier\.(?:out_proj\.)?(\w+)", r"score.\1"),
)

HAT = Conversion(  # not of its ForMultipleChoice, which looks at the last segment alone
    model_type="hierarchical-transformer",
    config=hat_config,
    heads={
        "HATForMaskedLM": "ForMaskedLM",
        "HATModel": "Model",
        "HATForSequenceClassification": "ForSequenceClassification",
        "HATForTokenClassification": "ForTokenClassification",
    },
    default_head="ForMaskedLM",
    prepare=in_order,
    original=refuse("the original's code runs under transformers 4.38 only."),
    rules=(
        Rule(r"levels\.(\d+)(?:\.\d+)?", r"model.embed_positions.levels.\1.weight"),
        *encoder_rules("hi_transformer", lambda ours: rf"model.layers.\1.{ours}"),
        *ROBERTA_HEADS,
    ),
)

ROBERTA = Conversion(
    model_type="roberta",
    config=warm_config(RobertaConfig, lambda fields: fields.get("pad_token_id", 1) + 1),
    choices=CHOICES,
    heads={
        "RobertaForMaskedLM": "ForMaskedLM",
        "RobertaModel": "Model",
        "RobertaForSequenceClassification": "ForSequenceClassification",
        "RobertaForTokenClassification": "ForTokenClassification",
    },
    default_head="ForMaskedLM",
    original=WARM_START,
    rules=encoder_rules("roberta", copies, warm_positions("roberta", after_padding=True)) + ROBERTA_HEADS,
)

BERT = Conversion(
    model_type="bert",
    config=warm_config(BertConfig, lambda fields: 0),
    choices=CHOICES,
    heads={
        "BertForMaskedLM": "ForMaskedLM",
        "BertForPreTraining": "ForMaskedLM",
        "BertModel": "Model",
        "BertForSequenceClassification": "ForSequenceClassification",
        "BertForTokenClassification": "ForTokenClassification",
    },
    default_head="ForMaskedLM",
    prepare=weights_and_biases,
    original=WARM_START,
    rules=(
        *encoder_rules("bert", copies, warm_positions("bert", after_padding=False)),
        Rule(r"cls\.seq_relationship\.\w+"),
        Rule(r"cls\.predictions\.transform\.dense\.(\w+)", r"lm_head.dense.\1"),
        Rule(r"cls\.predictions\.transform\.LayerNorm\.(\w+)", r"lm_head.norm.\1"),
        Rule(r"cls\.predictions\.(?:decoder\.)?(weight|bias)", r"lm_head.decoder.\1"),
        Rule(r"classifier\.(\w+)", r"score.\1"),
    ),
)

CONVERSIONS = (HAT, ROBERTA, BERT)
