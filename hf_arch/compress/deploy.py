"""Models as programs of `torch.export` and ONNX, which run without hf_arch, on small devices and in other languages."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from hf_arch.compress.needs import need

TRACED = 1, 150  # batch and length of the example that is followed
OTHERS = (1, 90), (1, 201)  # of those at which what was made is compared with the model
NEAR = 1e-4  # of the largest number of the answer


class Read(nn.Module):
    """input_ids [batch, length] -> logits or hidden states [batch, length, ...]"""

    inputs = ("input_ids",)

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False)[0]


class ReadAndAnswer(Read):
    """The same of an encoder-decoder, whose answer begins with decoder_input_ids [batch, answer length]."""

    inputs = ("input_ids", "decoder_input_ids")

    def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False)[0]


@torch.no_grad()
def to_program(model: PreTrainedModel, length: int | None = None) -> ExportedProgram:
    """`model` as a program of torch.export: input_ids [1, length] (and decoder_input_ids, where it has a decoder
    beside its encoder) -> the first of what the model answers, logits or hidden states. Example:

        program = hf_arch.compress.to_program(model)
        logits = program.module()(input_ids)
        torch.export.save(program, "model.pt2")

    A program reads one text, of any length; or, where a `length` is given, of exactly so many tokens: in a causal
    model, for any text up to it, filled up with whatever tokens, since later ones change nothing. That is the way for
    what works in chunks, buckets or choices: Python counts them while the program is written, and it would hold their
    number for one length. Before it is answered, the program is compared with the model at other lengths.

    Raises ValueError where it cannot be written for any length, or answers otherwise than the model: the error says
    how far writing came. The model stays as it is.
    """
    with evaluating(model):
        return written(model, length)[0]


@torch.no_grad()
def to_onnx(model: PreTrainedModel, path: str | Path, length: int | None = None) -> None:
    """As `to_program`, as an ONNX file, whole or not at all; beside it `<path>.data` where the weights are over 2 GB.
    Example:

        hf_arch.compress.to_onnx(model, "model.onnx")
        session = onnxruntime.InferenceSession("model.onnx")
        (logits,) = session.run(None, {"input_ids": ids})  # int64, [1, length]

    Before it is put there, onnxruntime has run it at other lengths, and answered as the model. Raises as `to_program`,
    and ImportError where onnx, onnxscript or onnxruntime is not installed.
    """
    need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    path = Path(path)
    with evaluating(model):
        program, reader = written(model, length)
        try:
            names = {"input_names": reader.inputs, "output_names": ["answer"]}
            made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(f"{named(model)} has operations that ONNX has not: {first_line(error)}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            made.save(Path(folder, path.name))
            session = onnxruntime.InferenceSession(Path(folder, path.name), providers=["CPUExecutionProvider"])
            compare(reader, functools.partial(run, session), sizes(length))
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


def written(model: PreTrainedModel, length: int | None) -> tuple[ExportedProgram, Read]:
    reader = (ReadAndAnswer if model.config.is_encoder_decoder else Read)(model)
    batch, tokens = TRACED if length is None else (1, length)
    shapes = tuple({1: Dim.AUTO} for _ in reader.inputs) if length is None else None
    try:
        program = torch.export.export(
            reader,
            some_tokens(reader, batch, tokens),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as error:  # of many kinds, none of them torch.export's own
        raise ValueError(refusal(model, length, error)) from error
    compare(reader, program.module(), sizes(length))
    return program, reader


def some_tokens(reader: Read, batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """A text for each input; they differ in length, so that none is taken for the other's."""
    draw, most = torch.Generator().manual_seed(length), reader.model.config.vocab_size
    lengths = [max(1, length - 7 * number) for number in range(len(reader.inputs))]
    tokens = [torch.randint(most, (batch, each), generator=draw) for each in lengths]
    return tuple(ids.to(reader.model.device) for ids in tokens)


def sizes(length: int | None) -> tuple[tuple[int, int], ...]:
    return OTHERS if length is None else ((1, length),)


def compare(reader: Read, run: Callable, sizes: tuple[tuple[int, int], ...]) -> None:
    for batch, length in sizes:
        told = some_tokens(reader, batch, length)
        expected = reader(*told).cpu().float()
        try:
            found = run(*told).cpu().float()
        except Exception as error:  # of the runtime
            raise ValueError(refusal(reader.model, None, error)) from error
        worst = ((found - expected).abs().max() / expected.abs().max()).item()
        if not worst < NEAR:
            raise ValueError(f"{named(reader.model)} answers otherwise as a program, by {worst:.1e}: it was not kept.")


def refusal(model: PreTrainedModel, length: int | None, error: Exception) -> str:
    advice = "" if length else " Give a length: the program is then for texts up to it."
    return f"{named(model)} is no program for texts of {length or 'any number of'} tokens: {first_line(error)}{advice}"


def named(model: PreTrainedModel) -> str:
    return f"A {type(model).__name__}"


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
