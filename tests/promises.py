"""The cases that the promises run over: every row of the catalogue, and the choices of the Transformer laboratory.

Models are tiny, in eval, and with weights far from small: at the usual initialisation attention is nearly uniform, and
faults hide below any tolerance. They are in float64, so that what should be equal is equal to 1e-8.
"""

import contextlib
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from hf_arch import ARCHITECTURES, Architecture

VARIANTS = {
    "transformer": {
        "gpt2": {"position_type": "learned", "norm_type": "layer_norm", "feed_forward_types": ["dense"] * 2}
        | {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "vaswani": {"position_type": "sinusoidal", "residual_type": "post_norm", "norm_type": "layer_norm"}
        | {"feed_forward_types": ["dense"] * 2, "hidden_act": "relu", "num_key_value_heads": None},
        "deep_norm": {"residual_type": "deep_norm", "norm_type": "layer_norm"},
        "parallel": {"residual_type": "parallel", "num_key_value_heads": 1, "position_type": "xpos"},
        "alibi": {"position_type": "alibi", "num_attention_heads": 6, "head_dim": 8, "num_key_value_heads": 3},
        "t5": {"position_type": "t5", "num_key_value_heads": None},
        "none": {"position_type": "none", "head_dim": 12, "embedding_norm": True},
        "sliding": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
        "sliding_alibi": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "position_type": "alibi"},
        "shared": {"num_hidden_groups": 1, "num_hidden_layers": 3, "hidden_act": "gelu"},
        "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "prefix": {"direction": "prefix"},
    }
}


WINDOWS = {"padding does not enter the state": "transformers' cache of a window counts columns, padding included."}
EXCEPTIONS = {"sliding": WINDOWS, "sliding_alibi": WINDOWS}


@dataclass(frozen=True)
class Case:
    row: Architecture
    head: str
    variant: str = ""
    fields: dict = field(default_factory=dict)

    def keeps(self, promise: str) -> contextlib.AbstractContextManager:
        """Where the row declares that its mathematics cannot keep a promise, the promise must indeed be broken."""
        excepted = self.row.exceptions | EXCEPTIONS.get(self.variant, {})
        return pytest.raises(AssertionError) if promise in excepted else contextlib.nullcontext()

    def __str__(self) -> str:
        return f"{self.row.name}-{self.variant or self.head}"

    def config(self, **overrides):
        return self.row.tiny_config(self.head, **({"initializer_range": 0.2} | self.fields | overrides))

    def build(self, dtype: torch.dtype = torch.float64, **overrides) -> nn.Module:
        torch.manual_seed(0)
        model = self.row.load(self.head)(self.config(**overrides)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases: neither ones nor zeros
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model.to(dtype)


ROWS = [Case(row, "ForCausalLM") for row in ARCHITECTURES if "ForCausalLM" in row.heads]
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
ENCODERS += [
    Case(case.row, case.head, f"bidirectional_{name}", VARIANTS["transformer"][name])
    for case in ENCODERS
    for name in ("vaswani", "alibi", "t5")
    if case.row.name == "transformer"
]

EXACT = {"atol": 1e-8, "rtol": 1e-8}
LENGTH = 70


def some_tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """Token ids without special ones."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def sums(past_key_values) -> list[torch.Tensor]:
    """The states that add up what was read. Those of convolutions hold copies of it, in its own type."""
    named = [item for layer in past_key_values.layers for item in getattr(layer, "states", {}).items()]
    return [state for name, state in named if name != "convolution"]


def inputs_and_labels(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    """What the case's head takes, with labels."""
    tokens = some_tokens()
    if case.head == "ForQuestionAnswering":
        return {"input_ids": tokens, "start_positions": torch.tensor([3, 9]), "end_positions": torch.tensor([5, 60])}
    if case.head == "ForSequenceClassification":
        return {"input_ids": tokens, "labels": torch.tensor([0, 1])}
    if case.head == "ForTokenClassification":
        return {"input_ids": tokens, "labels": tokens % 2}
    return {"input_ids": tokens} if case.head == "Model" else {"input_ids": tokens, "labels": tokens}
