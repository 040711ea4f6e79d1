"""Who takes part: every row of the catalogue that names next tokens, a row of choices by several of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_arch.architecture import Architecture
from hf_arch.catalogue import ARCHITECTURES

WINDOW = 16  # of the contender that sees nothing else: what it solves needs no memory
HASHED = {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 16}
CHOICES = {
    "transformer": {
        **{kind: {"position_type": kind} for kind in ("rope", "xpos", "alibi", "none")},
        "window": {"position_type": "rope", "layer_types": "sliding_attention", "sliding_window": WINDOW},
    },
    "reformer": {f"{rounds}_rounds": HASHED | {"num_hashes": rounds} for rounds in (1, 4)},
}


@dataclass(frozen=True)
class Contender:
    row: Architecture
    choice: str = ""
    fields: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.row.name}-{self.choice}" if self.choice else self.row.name

    def build(self, shape: dict, seed: int = 0) -> nn.Module:
        fields = shape | self.row.head_fields.get("ForCausalLM", {}) | self.fields
        if "layer_types" in self.fields:
            fields |= {"layer_types": [self.fields["layer_types"]] * shape["num_hidden_layers"]}
        config = self.row.load("Config")(**fields, bos_token_id=None, eos_token_id=None)
        torch.manual_seed(seed)
        return self.row.load("ForCausalLM")(config)


CONTENDERS = tuple(
    Contender(row, choice, fields)
    for row in ARCHITECTURES
    if "ForCausalLM" in row.heads
    for choice, fields in CHOICES.get(row.name, {"": {}}).items()
)


def chosen(names: Sequence[str]) -> list[Contender]:
    """By name, or all of a row by the row's; all that there are where no name is given."""
    known = {contender.name for contender in CONTENDERS} | {contender.row.name for contender in CONTENDERS}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"There is no {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
    wanted = set(names) or known
    return [contender for contender in CONTENDERS if {contender.name, contender.row.name} & wanted]
