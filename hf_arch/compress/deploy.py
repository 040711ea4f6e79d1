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

TRACED = 3, 150  # batch and length of the example that is followed
OTHERS = (1, 90), (4, 201)  # of those at which what was made is compared with the model
NEAR = 1e-4  # of the largest number of the answer


class Read(nn.Module):
    """input_ids [batch, length] -> logits [batch, length, ...] of a causal model, to which padding behind a text is
    nothing: it changes no answer before it."""

    inputs = ("input_ids",)

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False)[0]


class ReadPadded(Read):
    """The same of a model that has to be told what is padding, by attention_mask [batch, length] of ones and zeros."""

    inputs = ("input_ids", "attention_mask")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


class ReadAndAnswer(Read):
    """The same of an encoder-decoder, whose answer begins with decoder_input_ids [batch, answer length]."""

    inputs = ("input_ids", "attention_mask", "decoder_input_ids")

    def forward(self, input_ids, attention_mask, decoder_input_ids) -> torch.Tensor:
        told = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        return self.model(**told, use_cache=False)[0]


@torch.no_grad()
def to_program(model: PreTrainedModel, length: int | None = None) -> ExportedProgram:
    """`model` as a program of torch.export -> the first of what the model answers, logits or hidden states. It reads
    `input_ids` [batch, length]; unless it is a causal language model, also `attention_mask` [batch, length], with zeros
    for padding; and of an encoder-decoder the `decoder_input_ids` [batch, answer length]. Example:

        program = hf_arch.compress.to_program(model)
        logits = program.module()(input_ids)
        torch.export.save(program, "model.pt2")

    Batch and length are any; or, where a `length` is given, texts have exactly so many tokens (an answer 7 less):
    shorter ones are padded, a causal model's with whatever tokens, since later ones change nothing. That is the way for
    what works in chunks: Python counts them while the program is written, which would hold their number for one length.
    Which rows of the catalogue are programs of which kind, docs/programs.md tells. Before it is answered, the program
    is compared with the model at other batches and lengths.

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
        (logits,) = session.run(None, {"input_ids": ids})  # int64, [batch, length]

    Before it is put there, onnxruntime has run it at other batches and lengths, and answered as the model. Raises as `to_program`,
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


def written(model: PreTrainedModel, length: int | None) -> tuple[ExportedProgram, Read]:
    reader = reader_of(model)
    batch, tokens = TRACED if length is None else (TRACED[0], length)
    dynamic = {0: Dim.AUTO} | ({1: Dim.AUTO} if length is None else {})
    try:
        program = torch.export.export(
            reader,
            some_texts(reader, batch, tokens),
            dynamic_shapes=tuple(dynamic for _ in reader.inputs),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as error:  # of many kinds, none of them torch.export's own
        raise ValueError(refusal(model, length, error)) from error
    compare(reader, program.module(), length)
    return program, reader


def reader_of(model: PreTrainedModel) -> Read:
    if model.config.is_encoder_decoder:
        return ReadAndAnswer(model)
    return (Read if model.can_generate() else ReadPadded)(model)


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
        if isinstance(reader, ReadPadded) and expected.shape[:2] == told[1].shape:
            expected, found = (answer[told[1].cpu() > 0] for answer in (expected, found))  # padding may get anything
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
