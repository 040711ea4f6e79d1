"""A Llama as a model of another kind, whose state does not grow: `python examples/uptrain.py [--model MODEL]`.

MODEL is a folder or a name on the Hub; without one, a small Llama first learns from the manual that Python carries, or
from `--text FILE...`. Its attention becomes windows with sinks, a Performer's, retention and SSD in turn: mixers begin
with its weights, learn to answer as its attention did, layer by layer, and adapters on the whole learn the rest. Beside
it: the same model from nothing, with the tokens that this took, and a trigram model with those that the Llama had.
"""

import argparse
from tempfile import TemporaryDirectory

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import hf_arch
from hf_arch.demo.ngrams import NGram
from hf_arch.demo.text import python_manual, read_files, split
from hf_arch.demo.tokens import TokenizedCorpus, Windows, train_tokenizer
from hf_arch.demo.training import measure

SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = ("sink_attention", "favor", "retention", "ssd")
COLUMNS = ("replaced", "fitted", "adapted", "from nothing", "recovered", "state at 4k", "at 32k")


def small_llama(tokenizer) -> LlamaForCausalLM:
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **SIZES))


def train(model: PreTrainedModel, steps: int, rate: float, told, windows: Windows, kind=Trainer, **options) -> None:
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            per_device_train_batch_size=told.batch,
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
        )
        trainer = kind(model, arguments, train_dataset=windows, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def uptrained(teacher: PreTrainedModel, kind: str, told, text: TokenizedCorpus) -> list[float | int]:
    """Losses of the student after each stage and of the same model from nothing, and the bytes of its states."""
    windows, losses = Windows(text.train, told.length), []
    torch.manual_seed(0)
    options = {"sliding_window": told.window} if kind == "sink_attention" else {}
    student = hf_arch.uptrain(teacher, kind, **options)
    losses.append(measure(student, text.held_out, told.length).loss)
    train(student, told.fit_steps, told.fit_rate, told, windows, hf_arch.MixerTrainer, teacher=teacher)
    losses.append(measure(student, text.held_out, told.length).loss)
    states = [hf_arch.describe(student, length).cache_bytes for length in (4096, 32768)]
    new = type(student)(student.config)
    student = get_peft_model(student, hf_arch.lora_config(student, r=16, lora_alpha=32))
    train(student, told.lora_steps, told.lora_rate, told, windows)
    train(new, told.fit_steps + told.lora_steps, told.rate, told, windows)
    return [*losses, *(measure(model, text.held_out, told.length).loss for model in (student, new)), *states]


def line(kind: str, teacher: float, replaced, fitted, adapted, new, *states) -> str:
    recovered = (new - adapted) / (new - teacher)
    losses = "".join(f"{loss:13.3f}" for loss in (replaced, fitted, adapted, new))
    return f"{kind:15}{losses}{recovered:13.0%}" + "".join(f"{held / 1024:10.0f} KiB" for held in states)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a causal Llama to begin with, and its tokenizer")
    parser.add_argument("--text", nargs="+", metavar="FILE")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--vocabulary", type=int, default=512, help="tokens, of a Llama that is trained here")
    for name, default, what in (
        ("length", 128, "tokens of a window of text"),
        ("window", 32, "tokens that attention with sinks sees"),
        ("batch", 8, "windows of text in a step"),
        ("steps", 400, "of the Llama's own training"),
        ("fit-steps", 40, "in which mixers learn from attention"),
        ("lora-steps", 40, "in which adapters learn from text"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    for name, default in (("rate", 4e-3), ("fit-rate", 4e-3), ("lora-rate", 4e-3)):
        parser.add_argument(f"--{name}", type=float, default=default)
    return parser.parse_args(given)


def main(told: argparse.Namespace) -> None:
    corpus = split("your text" if told.text else "the manual", read_files(told.text) if told.text else python_manual())
    if told.model:
        tokenizer = AutoTokenizer.from_pretrained(told.model)
        teacher = AutoModelForCausalLM.from_pretrained(told.model)
    else:
        tokenizer = train_tokenizer(corpus.train, told.vocabulary)
        teacher = small_llama(tokenizer)
    text = TokenizedCorpus.of(corpus, tokenizer, told.length)
    if not told.model:
        train(teacher, told.steps, told.rate, told, Windows(text.train, told.length))
    loss = measure(teacher, text.held_out, told.length).loss
    trigrams = NGram(text.train.tokens, 3, len(tokenizer)).loss(text.held_out.tokens)
    states = [hf_arch.describe(hf_arch.uptrain(teacher, "full_attention"), n).cache_bytes for n in (4096, 32768)]
    print(f"{corpus}. Loss in nats for a token: trigrams {trigrams:.3f}, the Llama {loss:.3f};")
    print("its keys and values are " + " and ".join(f"{held / 1024:.0f} KiB" for held in states) + " at 4k and 32k.")
    print(f"{'':15}" + "".join(f"{column:>{14 if 'at ' in column else 13}}" for column in COLUMNS))
    for kind in told.kinds:
        print(line(kind, loss, *uptrained(teacher, kind, told, text)), flush=True)


if __name__ == "__main__":
    logging.disable_progress_bar()
    main(arguments())
