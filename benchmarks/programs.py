"""`python -m benchmarks.programs [ROW ...]` tries which rows are programs of torch.export and ONNX files, and writes
docs/programs.md. A run replaces what was recorded of the rows that it ran; it takes seconds for each."""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnxruntime
import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.experiments.record import RESULTS, load, write
from hf_arch import ARCHITECTURES, find
from hf_arch.architecture import Architecture
from hf_arch.compress import to_onnx, to_program
from hf_arch.compress.deploy import in_words

NAME = "programs"
PAGE = Path(__file__).parents[1] / "docs" / "programs.md"
HEADS = {"ForCausalLM": "decoder", "ForMaskedLM": "encoder", "ForConditionalGeneration": "encoder-decoder"}
LENGTH = 64
WAYS = {"any": {}, "fixed": {"length": LENGTH}, "fixed, whole": {"length": LENGTH, "padded": False}}
INTRODUCTION = f"""# Programs without hf_arch

`hf_arch.compress.to_program(model)` writes a model as a program of `torch.export`, `to_onnx(model, path)` as an ONNX
file. "any": batch and length are any; "fixed": the batch is any, and texts have the `length=` that was told;
"fixed, whole": and no padding (`padded=False`). Each is
compared with the model at other batches (1 and 4, written for 3) and, where it is any, other lengths (90 and 201, for
150), an ONNX file as onnxruntime runs it; encoders and encoder-decoders are told of padding. This is what became of
the tiny config of each row (fixed: {LENGTH} tokens); `python -m benchmarks.programs` tries it again."""


def build(row: Architecture, head: str) -> PreTrainedModel:
    """The row's tiny model, with weights so large that all its parts show in the answer."""
    torch.manual_seed(0)
    model = row.load(head)(row.tiny_config(head, initializer_range=0.2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.01:  # a matrix that begins at nothing
                parameter.normal_(std=model.config.initializer_range)
    return model


def attempt(write: Callable) -> str | None:
    """Why it cannot be written, None where it can."""
    try:
        write()
    except ValueError as error:
        return str(error)
    return None


def tried(row: Architecture, head: str) -> dict:
    """Of each way, until one is a program and an ONNX file, why it is not; None where it is."""
    model, found = build(row, head), {}
    ways = WAYS if head != "ForCausalLM" else {name: way for name, way in WAYS.items() if way.get("padded", True)}
    for name, way in ways.items():
        found[name] = told = {"program": attempt(functools.partial(to_program, model, **way))}
        with TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            told["onnx"] = told["program"] or attempt(functools.partial(to_onnx, model, path, **way))
        if told["onnx"] is None:
            break
    return found


def page(record: dict) -> str:
    lines = ["| row | torch.export | ONNX | why no more |", "|---|---|---|---|"]
    for row in ARCHITECTURES:
        for head, told in HEADS.items():
            if head in row.heads:
                lines.append(line(f"`{row.name}`, {told}", record.get(row.name, {"heads": {}})["heads"].get(head)))
    made = "; ".join(dict.fromkeys(each["versions"] for each in record.values()))
    return "\n\n".join([INTRODUCTION, "\n".join(lines), f"Made with {made}.\n"])


def versions() -> str:
    libraries = torch, transformers, onnx, onnxruntime
    return ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)


def line(who: str, found: dict | None) -> str:
    if found is None:
        return f"| {who} | | | not tried yet |"
    kinds = [next((name for name, told in found.items() if told[form] is None), "-") for form in ("program", "onnx")]
    reasons = [reason for told in found.values() for reason in told.values() if reason]
    reasons = (reason.split(": ", 1)[-1].split(". Give a length")[0].rstrip(".") for reason in reasons)
    return f"| {who} | {' | '.join(kinds)} | {'; '.join(dict.fromkeys(map(shown, reasons)))} |"


def shown(reason: str, most: int = 160) -> str:
    reason = in_words(reason).replace("|", "/").replace("<", "&lt;")
    return reason if len(reason) <= most else reason[:most] + " ..."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.programs", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.rows or [row.name for row in ARCHITECTURES]:
        row = find(name)
        found = {head: tried(row, head) for head in HEADS if head in row.heads}
        record = (load(NAME, options.output) or {}) | {name: {"versions": versions(), "heads": found}}
        write(NAME, json.dumps(record, indent=1), options.output)
        for head, told in found.items():
            print(line(f"{name}, {HEADS[head]}", told), flush=True)
    if options.output == RESULTS:
        PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
