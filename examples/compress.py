"""A language model made smaller in several ways: `python examples/compress.py [--model FOLDER] [--text FILE...]`.

A small Transformer learns the text that Python carries (or `--model` and its tokenizer are taken, for `--text`). Then
its weights get eight and four bits; it loses half of its heads and feed-forward channels, and learns again, from the
text alone and from the answers of the whole model; a RetNet, whose memory does not grow, learns from these answers; and
the whole becomes an ONNX file. One table tells bytes, bits per byte of held-out text, and tokens per second, beside
those of n-grams.
"""

import argparse
import copy
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_arch
from hf_arch.compress import DistillationTrainer, prune, quantize, to_onnx
from hf_arch.demo.ngrams import NGram
from hf_arch.demo.text import python_manual, read_files, split
from hf_arch.demo.tokens import TokenizedCorpus, Windows, train_tokenizer
from hf_arch.demo.training import measure

LENGTH, VOCABULARY = 128, 1000  # of windows, in tokens; different tokens
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


class Onnx(torch.nn.Module):
    """An ONNX file as a causal language model that is told ids."""

    def __init__(self, path: Path):
        super().__init__()
        self.session, self.device = onnxruntime.InferenceSession(path), torch.device("cpu")

    def forward(self, input_ids: torch.Tensor):
        (logits,) = self.session.run(None, {"input_ids": input_ids.numpy()})
        return argparse.Namespace(logits=torch.from_numpy(logits))


def fitted(model, windows, folder: str, steps: int, teacher=None, lr: float = 3e-3):
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        learning_rate=lr,
        warmup_steps=steps // 10,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=8,
        logging_steps=max(1, steps // 2),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    options = {"train_dataset": windows}
    trainer = DistillationTrainer(model, arguments, teacher=teacher, **options) if teacher else None
    (trainer or Trainer(model, arguments, **options)).train()
    return model.eval()


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".onnx", ".data"))


def held_bytes(model, folder: Path) -> int:
    """Of the file with its weights; of four bits of torchao on a CPU, which has none, those in memory."""
    try:
        model.save_pretrained(folder)
        return size(folder)
    except ValueError:
        inside = [(getattr(p, "qdata", p), getattr(p, "scale_and_zero", p)) for p in model.parameters()]
        return sum(sum(x.numel() * x.element_size() for x in {id(x): x for x in pair}.values()) for pair in inside)


@torch.no_grad()
def speed(model) -> float:
    """Tokens of a batch of texts read in a second."""
    ids = torch.randint(3, 100, (8, LENGTH))
    model(input_ids=ids)
    start, rounds = time.perf_counter(), 3
    for _ in range(rounds):
        model(input_ids=ids)
    return rounds * ids.numel() / (time.perf_counter() - start)


def variants(model, windows, folder: Path, steps: int):
    """Names and models."""
    batches = [{name: ids[None] for name, ids in windows[place].items()} for place in range(0, len(windows), 5003)]
    yield "original", model
    for kind in ("int8", "nf4"):
        yield kind, quantize(model, kind)
    yield "int4, bfloat16", quantize(copy.deepcopy(model).bfloat16(), "int4")
    pruned = prune(model, heads=0.5, channels=0.5, batches=batches)
    yield "pruned", pruned
    yield "pruned, trained", fitted(copy.deepcopy(pruned), windows, folder, steps // 4, lr=1e-3)
    yield "pruned, distilled", fitted(pruned, windows, folder, steps // 4, teacher=model, lr=1e-3)
    config = hf_arch.find("retnet").load("Config")(
        **SIZES | {"intermediate_size": 256, "num_hidden_layers": 2}, vocab_size=model.config.vocab_size
    )
    torch.manual_seed(0)
    yield "distilled into RetNet", fitted(AutoModelForCausalLM.from_config(config), windows, folder, steps // 2, model)
    to_onnx(model, folder / "onnx" / "model.onnx")
    yield "ONNX", Onnx(folder / "onnx" / "model.onnx")


def main(arguments: list[str] | None = None) -> dict[str, tuple[int, float, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model of hf_arch with its tokenizer, a folder or on the Hub")
    parser.add_argument("--text", nargs="+", help="files to learn from and to measure with")
    parser.add_argument("--steps", type=int, default=300, help="of the first training; later ones have a part of it")
    asked = parser.parse_args(arguments)
    corpus = split("the text", read_files(asked.text) if asked.text else python_manual())
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(asked.model) if asked.model else train_tokenizer(corpus.train, VOCABULARY)
    tokens = TokenizedCorpus.of(corpus, tokenizer, LENGTH)
    windows, found = Windows(tokens.train, LENGTH), {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        if asked.model:
            model = AutoModelForCausalLM.from_pretrained(asked.model).eval()
        else:
            config = hf_arch.find("transformer").load("Config")(**SIZES, vocab_size=len(tokenizer))
            model = fitted(AutoModelForCausalLM.from_config(config), windows, name, asked.steps)
        for kind, made in variants(model, windows, folder, asked.steps):
            held = size(folder / "onnx") if kind == "ONNX" else held_bytes(made, folder / kind)
            found[kind] = held, measure(made, tokens.held_out, LENGTH).bits_per_byte, speed(made)
    print(corpus)
    print(f"{'variant':22} {'kB':>8} {'bits per byte':>14} {'tokens/s':>9}")
    for kind, (held, bits, rate) in found.items():
        print(f"{kind:22} {held / 1000:8.0f} {bits:14.3f} {rate:9.0f}")
    for order in (2, 3):
        if len(tokenizer) ** order < 2**63:
            grams = NGram(tokens.train.tokens, order, len(tokenizer))
            bits = tokens.held_out.figures(grams.loss(tokens.held_out.tokens)).bits_per_byte
            print(f"{f'{order}-grams':22} {'':8} {bits:14.3f}")
    return found


if __name__ == "__main__":
    main()
