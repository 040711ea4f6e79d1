"""Checkpoints of an original in our key names: a list of rules beside the model, and the one way to apply them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
Fields = dict[str, Any]  # of a config.json


class Rule:
    """Tensors whose whole name matches `pattern` become `targets`, where \\1 stands for the first group; without
    targets they are left behind. A target may be a function of (match, config) that answers with names: of a tensor
    that goes to several places, or to some that depend on our config.

    Targets are named as in a model with a head: `model.` begins the backbone, all else is of a head, and stays behind
    where another head is built. `change(tensor, config)` answers with a tensor, or with one for each name.
    """

    def __init__(self, pattern: str, *targets: str | Callable, change: Callable | None = None):
        self.pattern, self.targets, self.change = re.compile(pattern), targets, change

    def apply(self, match: re.Match, tensor: torch.Tensor, config) -> list[tuple[str, torch.Tensor]]:
        """Our names and tensors for a tensor whose name matched."""
        names = []
        for target in self.targets:
            names += target(match, config) if callable(target) else [match.expand(target)]
        if not names:
            return []
        pieces = tensor if self.change is None else self.change(tensor, config)
        if isinstance(pieces, torch.Tensor):
            pieces = [pieces, *(pieces.clone() for _ in names[1:])]
        return list(zip(names, pieces, strict=True))


class Stack:
    """Matrices of single experts become one tensor for all, [experts, out, in].

    `pattern` matches their whole names, with three groups: what all have in common, the number of the expert, and which
    of `parts` a matrix is. Those of one expert are joined by rows, in the order of `parts`; what comes of all is named
    `target`, where \\1 stands for what they have in common.
    """

    def __init__(self, pattern: str, target: str, parts: tuple[str, ...]):
        self.pattern, self.target, self.parts = re.compile(pattern), target, parts

    def apply(self, tensors: Tensors) -> Tensors:
        """All tensors, with those that match replaced. Raises ValueError where an expert lacks a part."""
        left, found = {}, {}
        for name, tensor in tensors.items():
            if match := self.pattern.fullmatch(name):
                found.setdefault(match.expand(self.target), {})[int(match[2]), match[3]] = tensor
            else:
                left[name] = tensor
        for target, matrices in found.items():
            experts = range(max(number for number, _ in matrices) + 1)
            if absent := {(number, part) for number in experts for part in self.parts} - matrices.keys():
                number, part = min(absent)
                raise ValueError(f"The checkpoint does not fit.\n{target} lacks {part} of expert {number}.")
            rows = (torch.cat([matrices[number, part] for part in self.parts]) for number in experts)
            left[target] = torch.stack(list(rows))
        return left


def refuse(reason: str) -> Callable:
    """An `original` of a Conversion that there is none of."""

    def original(folder: Path, fields: Fields, tensors: Tensors, head: str):
        raise ValueError(f"There is nothing to compare with: {reason}")

    return original


WARM_START = refuse("a warm start answers otherwise than the model that it begins with.")


@dataclass(frozen=True)
class Conversion:
    """How the checkpoints of one original are read.

    model_type: what their config.json says; one that says nothing is known by its field `mark`.
    heads: our head for each class that `architectures` may name; `default_head` where it names none.
    config: the fields of their config.json -> those of ours; raises ValueError for what ours cannot be.
    choices: fields of ours that the original leaves open, which `config` also takes by their names.
    describe: of originals without a config.json: the fields, `model_type` among them, that the tensors tell; {} where
        they are of another model.
    rules: the first that matches a tensor's name holds.
    prepare: (tensors, fields) -> tensors, where names differ by age, or a tensor is shared or absent by design.
    stacks: matrices of experts that are one tensor in ours, put together before the rules.
    fresh: what the original does not have, and begins as in a new model: a pattern of our names.
    original: (folder, fields, tensors, head) -> the original's own model, a callable on ids that answers with logits or
        hidden states; by default transformers' class of the head.
    """

    model_type: str
    config: Callable[[Fields], Fields]
    heads: dict[str, str]
    rules: tuple[Rule, ...]
    default_head: str = "Model"
    mark: str | None = None
    choices: tuple[str, ...] = ()
    describe: Callable[[Tensors], Fields] | None = None
    prepare: Callable[[Tensors, Fields], Tensors] = lambda tensors, fields: tensors
    stacks: tuple[Stack, ...] = ()
    fresh: str | None = None
    original: Callable[[Path, Fields, Tensors, str], Callable] | None = None

    def takes(self, fields: Fields) -> bool:
        found = fields.get("model_type")
        return found == self.model_type or (not found and self.mark in fields)

    def head_of(self, fields: Fields) -> str:
        names = fields.get("architectures") or []
        if names and names[0] not in self.heads:
            raise ValueError(f"{names[0]} has no counterpart; {', '.join(self.heads)} have. Or give `head`.")
        return self.heads[names[0]] if names else self.default_head

    def translate(self, tensors: Tensors, fields: Fields, model: nn.Module) -> Tensors:
        """The state of `model` (on the meta device, its config made by `config`) from the original's tensors.

        Every tensor is used or left behind by a rule, every parameter is filled or tied, every shape fits: else a
        ValueError names those that are not.
        """
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        bare, left_behind = model.base_model is model, model._keys_to_ignore_on_load_unexpected
        state, origin, misfits, faults = {}, {}, set(), Faults()
        tensors = self.prepare(tensors, fields)
        for stack in self.stacks:
            tensors = stack.apply(tensors)
        for source, tensor in tensors.items():
            rule, match = next(((r, m) for r in self.rules if (m := r.pattern.fullmatch(source))), (None, None))
            if rule is None:
                faults.add("tensors that no rule knows", source)
                continue
            for name, piece in rule.apply(match, tensor, model.config):
                of_backbone = name.startswith("model.")
                name = name.removeprefix("model.") if bare else name
                if name not in wanted:
                    if of_backbone and not any(re.search(left, name) for left in left_behind):
                        faults.add("tensors that the config leaves no place for", source)
                elif piece.shape != wanted[name]:
                    faults.add("shapes that differ", f"{source} {list(piece.shape)}, not {list(wanted[name])}")
                    misfits.add(name)
                elif name in state and not torch.equal(state[name], piece):
                    faults.add("tensors that should be equal", f"{origin[name]} and {source}")
                else:
                    state[name], origin[name] = piece, source
        self.tie(state, origin, model, faults)
        fresh = {name for name in wanted if self.fresh and re.fullmatch(self.fresh, name)}
        for name in sorted(wanted.keys() - state.keys() - misfits - fresh):
            faults.add("parameters that the checkpoint does not have", name)
        faults.report()
        return {name: separate(tensor) for name, tensor in state.items()}

    def tie(self, state: Tensors, origin: dict[str, str], model: nn.Module, faults: "Faults") -> None:
        """Let tied parameters be each other's; a checkpoint that stores both must agree with itself."""
        for target, source in model.all_tied_weights_keys.items():
            for here, there in ((target, source), (source, target)):
                if there in state:
                    state.setdefault(here, state[there])
            if source in state and not torch.equal(state[target], state[source]):
                faults.add("tensors that are tied, but differ", f"{origin[source]} and {origin[target]}")


class Faults:
    """What is wrong with a checkpoint, by kind, said in one ValueError."""

    def __init__(self):
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        self.found.setdefault(kind, []).append(what)

    def report(self, shown: int = 5) -> None:
        if not self.found:
            return
        lines = [
            f"{len(names)} {kind}: {', '.join(names[:shown])}{', ...' if len(names) > shown else ''}"
            for kind, names in self.found.items()
        ]
        raise ValueError("The checkpoint does not fit.\n" + "\n".join(lines))


def separate(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that owns its memory, as safetensors wants them."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def require(fields: Fields, **values) -> None:
    """Raise ValueError where the original was built with a choice that ours does not have; a tuple allows several."""
    for name, value in values.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if fields.get(name, allowed[0]) not in allowed:
            known = ", ".join(map(repr, allowed))
            raise ValueError(f"{name} is {fields[name]!r} in config.json; only {known} can be converted.")
