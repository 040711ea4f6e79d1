"""The cases that the promises run over: every row of the catalogue, and the choices of the Transformer laboratory.

Models are tiny, in eval, and with weights far from small: at the usual initialisation attention is nearly uniform, and
faults hide below any tolerance. They are in float64, so that what should be equal is equal to 1e-8.
"""

import contextlib
import re
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

from hf_arch import ARCHITECTURES, Architecture
from hf_arch.modeling.hierarchical.hnet.modeling_hnet import DynamicChunking
from hf_arch.modeling.layers.centroids import Centroids
from hf_arch.modeling.layers.early_exit import EarlyExitView
from hf_arch.modeling.layers.hierarchical_cross_attention import HierarchicalCrossAttention
from hf_arch.modeling.layers.retrieval_attention import RetrievalAttention
from hf_arch.modeling.layers.routed_view import RoutedView
from hf_arch.modeling.layers.routers import ExpertChoiceRouter, HierarchicalRouter, TopKRouter
from hf_arch.modeling.long_context.reformer.modeling_reformer import LSHAttention
from variants import EXCEPTIONS, VARIANTS


@dataclass(frozen=True)
class Case:
    row: Architecture
    head: str
    variant: str = ""
    fields: dict = field(default_factory=dict)

    def keeps(self, promise: str) -> contextlib.AbstractContextManager:
        """Where the row declares that its mathematics cannot keep a promise, the promise must indeed be broken."""
        return pytest.raises(AssertionError) if promise in self.exceptions else contextlib.nullcontext()

    @property
    def exceptions(self) -> dict[str, str]:
        """Those of the row; a variant has its own."""
        return EXCEPTIONS.get(self.variant, {}) if self.variant else self.row.exceptions

    def __str__(self) -> str:
        return f"{self.row.name}-{self.variant or self.head}"

    @property
    def answers(self) -> bool:
        """Whether the head reads a source and writes an answer to it."""
        return self.head == "ForConditionalGeneration"

    def config(self, **overrides):
        return self.row.tiny_config(self.head, **({"initializer_range": 0.2} | self.fields | overrides))

    def build(self, dtype: torch.dtype = torch.float64, **overrides) -> nn.Module:
        torch.manual_seed(0)
        model = self.row.load(self.head)(self.config(**overrides)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases: neither ones nor zeros
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif parameter.std() < 0.01:  # a matrix that begins at nothing
                    parameter.normal_(std=model.config.initializer_range)
        return model.to(dtype)

    def shallow(self) -> dict:
        """Fields of the config with the fewest layers that have every part: compiling takes its time by the layer."""
        config = self.config()
        last = dict(zip(config.layer_types, config.feed_forward_types, strict=True))  # which may be none in the first
        fields = {"num_hidden_layers": len(last), "layer_types": [*last], "feed_forward_types": [*last.values()]}
        if self.answers:
            kinds = [*dict.fromkeys(config.encoder_layer_types)]
            fields |= {"encoder_num_hidden_layers": len(kinds), "encoder_layer_types": kinds}
        return fields if parts(self.build(**fields)) == parts(self.build()) else {}

    def decoder(self, **options) -> nn.Module:
        """The model as one that goes on with a text: of an answer, where there is a source."""
        model = self.build(**options)
        return Answering(model) if self.answers else model


def parts(model: nn.Module) -> set[str]:
    """The names of its parameters, without the numbers of layers."""
    return {re.sub(r"\d+", "N", name) for name, _ in model.named_parameters()}


class Answering(nn.Module):
    """An encoder-decoder as the decoder of one source. Packed answers have as many copies of the source, packed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def source(self, batch: int, copies: int = 1) -> dict[str, torch.Tensor]:
        told = {"input_ids": some_tokens(1, 20, seed=9).repeat(batch, copies)}
        return told | {"position_ids": torch.arange(20).repeat(copies)[None].expand(batch, -1)}

    def forward(self, input_ids, attention_mask=None, position_ids=None, **told):
        copies = 1
        if position_ids is not None:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            copies += int(((position_ids.diff() != 1) & (real[:, 1:] + real[:, :-1] == 2))[0].sum())
        answer = {"decoder_attention_mask": attention_mask, "decoder_position_ids": position_ids}
        return self.model(**self.source(len(input_ids), copies), decoder_input_ids=input_ids, **answer, **told)

    def generate(self, input_ids, attention_mask=None, **options):
        answer = {"decoder_input_ids": input_ids, "decoder_start_token_id": input_ids[:, 0].tolist()}
        if "past_key_values" in options:  # generate() finds by the mask how much of the answer a cache has read
            attention_mask = torch.ones_like(input_ids)
        if attention_mask is not None:
            answer["decoder_attention_mask"] = attention_mask
        return self.model.generate(**self.source(len(input_ids)), **answer, **options)


def new_cache(model: nn.Module) -> Cache:
    """An empty one, to go on with."""
    cache = DynamicCache(config=model.config)
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def cache_layers_of(cache: Cache) -> list:
    """Those that hold what was read of the text itself."""
    return getattr(cache, "self_attention_cache", cache).layers


ROWS = [
    Case(row, head)
    for row in ARCHITECTURES
    for head in ("ForCausalLM", "ForConditionalGeneration")
    if head in row.heads
]
MODELS = ROWS + [
    Case(row, "ForMaskedLM")
    for row in ARCHITECTURES
    if not {"ForCausalLM", "ForConditionalGeneration"} & {*row.heads} and "ForMaskedLM" in row.heads
]
HEADS = [Case(row, head) for row in ARCHITECTURES for head in row.heads]
DECODERS = [
    *ROWS,
    *(
        Case(case.row, case.head, name, fields)
        for case in ROWS
        for name, fields in VARIANTS.get(case.row.name, {}).items()
    ),
]
ENCODERS = [Case(row, "ForMaskedLM") for row in ARCHITECTURES if "ForMaskedLM" in row.heads]
ALSO_ENCODERS = {
    "transformer": ("vaswani", "alibi", "t5"),
    "s4": ("bilinear",),
    "routing_transformer": ("turned",),
    "longformer": ("wide", "layers", "questions"),
    "reformer": ("lsh",),
    "bigbird": ("no_global_block",),
    "hourglass": ("plain",),
}  # of the choices of decoders
ENCODERS += [
    Case(case.row, case.head, f"bidirectional_{name}", VARIANTS[case.row.name][name])
    if "ForCausalLM" in case.row.heads
    else Case(case.row, case.head, name, VARIANTS[case.row.name][name])
    for case in ENCODERS
    for name in ALSO_ENCODERS.get(case.row.name, VARIANTS.get(case.row.name, {}))
]
ENCODERS += [
    Case(case.row, case.head, "extended", {"num_extra_global_tokens": 6, "num_random_blocks": 1})
    for case in ENCODERS
    if case.row.name == "bigbird" and not case.variant
]  # which a decoder cannot be
ENCODERS += [
    Case(ENCODERS[0].row, "ForMaskedLM", kind, {"feed_forward_types": ["gated", kind], "num_local_experts": 4})
    for kind in ("expert_choice", "soft")
]


@contextlib.contextmanager
def held_choices():
    """Each router chooses the experts, each hash the buckets, and each head the clusters, that it chose first for as
    many tokens: a choice that a rounding error turns says nothing of precision."""
    held = {}
    kinds = TopKRouter, HierarchicalRouter, ExpertChoiceRouter, LSHAttention, RetrievalAttention
    kinds += (HierarchicalCrossAttention,)
    choices = *((kind, "choose") for kind in kinds), (Centroids, "nearest")
    choices += ((RoutedView, "decide"), (EarlyExitView, "decide"), (DynamicChunking, "decide"))

    def first(choose):
        return lambda self, scores, *of: held.setdefault((self, scores.shape[:-1]), choose(self, scores, *of))

    with contextlib.ExitStack() as stack:
        for kind, name in choices:
            stack.enter_context(patch.object(kind, name, first(getattr(kind, name))))
        yield


EXACT = {"atol": 1e-8, "rtol": 1e-8}
LENGTH = 70


def some_tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """Token ids without special ones."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def sums(past_key_values) -> list[torch.Tensor]:
    """The states that add up what was read. Those of convolutions and shifts hold copies of it, in its own type."""
    named = [item for layer in cache_layers_of(past_key_values) for item in getattr(layer, "states", {}).items()]
    return [
        state
        for name, state in named
        if not any(kind in name for kind in ("convolution", "shift", "history", "memory", "window"))
    ]


def inputs_and_labels(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    """What the case's head takes, with labels."""
    tokens = some_tokens()
    if case.head == "ForQuestionAnswering":
        return {"input_ids": tokens, "start_positions": torch.tensor([3, 9]), "end_positions": torch.tensor([5, 60])}
    if case.head == "ForSequenceClassification":
        return {"input_ids": tokens, "labels": torch.tensor([0, 1])}
    if case.head == "ForMultipleChoice":
        return {"input_ids": some_tokens(4).view(2, 2, -1), "labels": torch.tensor([0, 1])}
    if case.head == "ForTokenClassification":
        return {"input_ids": tokens, "labels": tokens % 2}
    if case.head == "ForSegmentClassification":
        return {"input_ids": tokens, "labels": torch.tensor([[0, 1, 1, 0, 1], [1, 0, -100, 1, 0]])}
    if case.head == "ForPreTraining":
        hidden = torch.zeros_like(tokens)
        hidden[0, 16] = hidden[:, 48] = 1
        return {"input_ids": tokens, "labels": tokens, "original_ids": tokens.flip(0), "hidden_segments": hidden}
    if case.head == "Model" and model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :30]}
    return {"input_ids": tokens} | ({} if case.head in ("Model", "EncoderModel") else {"labels": tokens})
