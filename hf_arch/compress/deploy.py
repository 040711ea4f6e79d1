"""Models as programs of `torch.export` and ONNX, which run without hf_arch, on small devices and in other languages."""

import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from hf_arch.compress.needs import need

TRACED = 3, 150  # batch and length of the example that is followed
OTHERS = (1, 90), (4, 201)  # of those at which what was made is compared with the model
NEAR = 1e-4  # of the largest number of the answer
WORDS = {  # what torch.export says -> what it means here
    "data-dependent": "sizes inside it depend on what the tokens say, or on where padding lies",
    "Runtime assertion failed": "Python counts its parts while the program is written, for one length",
    "Guard failed": "Python counts its parts while the program is written, for one size",
    "control flow": "Python asks how many there are of something while the program is written",
    "complex-valued": "ONNX has no complex numbers",
    "functional graph": "it writes into views of tensors, which ONNX has not",
}


class Read(nn.Module):
    """The inputs of a model, in order -> logits or hidden states [batch, length, ...]"""

    def __init__(self, model: PreTrainedModel, padded: bool):
        super().__init__()
        self.model, both = model, model.config.is_encoder_decoder
        told = {
            "input_ids": True,
            "attention_mask": padded and (both or not model.can_generate()),  # later tokens change nothing in a decoder
            "decoder_input_ids": both,
        }
        self.inputs = tuple(name for name, needed in told.items() if needed)

    def forward(self, *told: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.inputs, told, strict=True)), use_cache=False)[0]


@torch.no_grad()
def to_program(model: PreTrainedModel, length: int | None = None, padded: bool = True) -> ExportedProgram:
    """`model` as a program of torch.export -> the first of what the model answers, logits or hidden states. It reads
    `input_ids` [batch, length]; unless it is a causal language model, also `attention_mask` [batch, length], with zeros
    for padding; and of an encoder-decoder the `decoder_input_ids` [batch, answer length]. Example:

        program = hf_arch.compress.to_program(model)
        logits = program.module()(input_ids)
        torch.export.save(program, "model.pt2")

    Batch and length are any; or, where a `length` is given, texts have exactly so many tokens (an answer 7 less):
    shorter ones are padded, a causal model's with whatever tokens, since later ones change nothing. That is the way for
    what works in chunks: Python counts them while the program is written, which would hold their number for one length.
    Some models look for padding in ways that no program can follow: not `padded`, they read texts that are whole. Which
    rows of the catalogue are programs of which kind, docs/programs.md tells. Before it is answered, the program is
    compared with the model at other batches and lengths.

    Raises ValueError where it cannot be written for any length, or answers otherwise than the model: the error says
    how far writing came. The model stays as it is.
    """
    with evaluating(model):
        return written(model, length, padded)[0]


@torch.no_grad()
def to_onnx(model: PreTrainedModel, path: str | Path, length: int | None = None, padded: bool = True) -> None:
    """As `to_program`, as an ONNX file, whole or not at all; beside it `<path>.data` where the weights are over 2 GB.
    Example:

        hf_arch.compress.to_onnx(model, "model.onnx")
        session = onnxruntime.InferenceSession("model.onnx")
        (logits,) = session.run(None, {"input_ids": ids})  # int64, [batch, length]

    Before it is put there, onnxruntime has run it at other batches and lengths, and answered as the model. Raises as
    `to_program`, and ImportError where onnx, onnxscript or onnxruntime is not installed.
    """
    need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    path = Path(path)
    with evaluating(model):
        program, reader = written(model, length, padded)
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            try:
                names = {"input_names": reader.inputs, "output_names": ["answer"]}
                # Not optimized: onnxruntime does that when it reads, and onnxscript's optimizer fails at split texts
                torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, **names).save(made)
                session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
            except Exception as error:  # of many kinds, each library's own
                raise ValueError(f"{named(model)} is no ONNX file: {reason(error)}") from error
            compare(reader, functools.partial(run, session), length)
            for made_file in Path(folder).iterdir():
                os.replace(made_file, path.parent / made_file.name)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def run(session, *tokens: torch.Tensor) -> torch.Tensor:
    """What onnxruntime answers."""
    names = [each.name for each in session.get_inputs()]
    (answer,) = session.run(None, {name: ids.cpu().numpy() for name, ids in zip(names, tokens, strict=True)})
    return torch.from_numpy(answer)


def written(model: PreTrainedModel, length: int | None, padded: bool) -> tuple[ExportedProgram, Read]:
    reader = Read(model, padded)
    batch, tokens = TRACED if length is None else (TRACED[0], length)
    dynamic = {0: Dim.AUTO} | ({1: Dim.AUTO} if length is None else {})
    try:
        program = torch.export.export(
            reader,
            some_texts(reader, batch, tokens),
            dynamic_shapes=(tuple(dynamic for _ in reader.inputs),),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as error:  # of many kinds, none of them torch.export's own
        raise ValueError(refusal(model, length, error)) from error
    compare(reader, program.module(), length)
    return program, reader


def some_texts(reader: Read, batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """The reader's inputs. An answer is as long as no text, so that neither length is taken for the other's."""
    draw, most = torch.Generator().manual_seed(length), reader.model.config.vocab_size
    ends = (length - 5 * torch.arange(batch)).clamp(min=1)
    made = {
        "input_ids": torch.randint(most, (batch, length), generator=draw),
        "attention_mask": (torch.arange(length) < ends[:, None]).long(),
        "decoder_input_ids": torch.randint(most, (batch, max(1, length - 7)), generator=draw),
    }
    return tuple(made[name].to(reader.model.device) for name in reader.inputs)


def compare(reader: Read, run: Callable, length: int | None) -> None:
    for batch, tokens in OTHERS if length is None else [(batch, length) for batch, _ in OTHERS]:
        told = some_texts(reader, batch, tokens)
        expected = reader(*told).cpu().float()
        try:
            found = run(*told).cpu().float()
        except Exception as error:  # of the runtime
            raise ValueError(refusal(reader.model, length, error)) from error
        real = dict(zip(reader.inputs, told, strict=True)).get("attention_mask")
        if real is not None and expected.shape[:2] == real.shape:
            expected, found = (answer[real.cpu() > 0] for answer in (expected, found))  # padding may get anything
        worst = ((found - expected).abs().max() / expected.abs().max()).item()
        if not worst < NEAR:
            raise ValueError(f"{named(reader.model)} answers otherwise as a program, by {worst:.1e}: it was not kept.")


def refusal(model: PreTrainedModel, length: int | None, error: Exception) -> str:
    advice = "" if length else " Give a length: the program is then for texts up to it."
    return f"{named(model)} is no program for texts of {length or 'any number of'} tokens: {reason(error)}.{advice}"


def named(model: PreTrainedModel) -> str:
    return f"This {type(model).__name__}"


def reason(error: BaseException) -> str:
    """The first line of what began it, in our words where we have some."""
    while error.__cause__ is not None:
        error = error.__cause__
    return in_words(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))


def in_words(line: str) -> str:
    if words := next((words for said, words in WORDS.items() if said in line), None):
        return words
    missing = re.match(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", line)
    return f"ONNX has no {missing[1]}" if missing else line
