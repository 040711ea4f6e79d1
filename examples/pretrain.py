"""A model from text alone: `python examples/pretrain.py --architecture retnet --objective causal --text FILE...`

Objectives are causal, prefix, masked, span and hierarchical; an architecture without the head for one says which have
it. Texts are cleaned, duplicates dropped, a tenth of the documents held out; a tokenizer is trained (`--tokenizer
FOLDER` takes yours, `--tokenizer bytes` none) and documents are packed into rows. Without `--text` it reads the manual
that every Python carries. It ends with what held-out text costs, beside n-gram models of the same tokens.

Any option of `transformers.TrainingArguments` may follow (`--max_steps 10000 --gradient_checkpointing --warmup_steps
500 ...`), and `--fields '{"num_local_experts": 8, ...}'` sets what the architecture's config has beside sizes.

    --augment 0.1        also train with a tenth of the tokens replaced, deleted or inserted, and show both
    --stream             read files (text, .jsonl, .gz) while training: they may be larger than the memory
    --resume             go on from the last checkpoint of a run that ended early, to the same weights
    --precision bf16     mixed precision; fp16 needs a GPU
    --word-vectors FILE  begin from word2vec or GloVe

On several processes: `accelerate launch --num_processes N examples/pretrain.py ...`, or on CPUs, where accelerate needs
mpirun for more than one, `torchrun --nproc_per_node N examples/pretrain.py ...`, is data parallel; `--sharded` splits
the weights among the processes (FSDP2), `--tensor-parallel N` each matrix among N of them. On GPUs `accelerate launch
--use_fsdp --fsdp_version 2` shards, too, and can resume; on CPUs accelerate takes that for data parallel.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_arch
from hf_arch.corpus.cleaning import boilerplate_lines
from hf_arch.corpus.streaming import Corpus, streamed, token_documents
from hf_arch.demo.ngrams import NGram
from hf_arch.demo.text import Document, python_manual
from hf_arch.demo.tokens import train_tokenizer
from hf_arch.objectives import OBJECTIVES, Objective, check_objective, objective
from hf_arch.sharding import check_sharding, sharded

SOME_TEXTS, SOME_TOKENS = 20_000, 5_000_000  # of a stream, for the tokenizer and for the n-gram models
MOST_HELD_OUT = 500  # documents
DEFAULTS = {"max_steps": 500, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}
DEFAULTS |= {"warmup_steps": 25, "weight_decay": 0.1, "adam_beta2": 0.95, "save_steps": 250, "logging_steps": 50}
DEFAULTS |= {"report_to": "none", "disable_tqdm": "true", "ddp_find_unused_parameters": "false"}


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and what is left for TrainingArguments."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=form)
    parser.add_argument("--architecture", default="retnet")
    parser.add_argument("--objective", default="causal", choices=OBJECTIVES)
    parser.add_argument("--text", nargs="+", metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("pretrained"))
    parser.add_argument("--tokenizer", metavar="FOLDER|bytes")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--fields", type=json.loads, default={}, metavar="JSON")
    parser.add_argument(
        "--duplicates", type=float, default=0.8, help="how like documents are that are one; 0: keep all"
    )
    parser.add_argument("--augment", type=float, default=0.0, metavar="RATE")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--word-vectors", metavar="FILE")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    for name in ("stream", "resume", "sharded"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_known_args(argv)


def check(options: argparse.Namespace, state: PartialState) -> None:
    """What cannot work is said before anything is read."""
    check_objective(options.objective, hf_arch.find(options.architecture))
    check_sharding(options.tensor_parallel, state)
    if state.num_processes == 1 and "MASTER_ADDR" in os.environ:
        print("This is one process. On CPUs accelerate starts more by mpirun alone: take torchrun --nproc_per_node N.")
    if options.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("fp16 needs a GPU: on this machine take --precision bf16, which needs no scaling of the loss.")
    if options.resume and (options.sharded or options.tensor_parallel > 1):
        raise ValueError("--resume does not go with --sharded or --tensor-parallel: not all of the optimizer is saved.")
    if not options.resume and list(options.output.glob("*/checkpoint-*")):
        raise ValueError(f"{options.output} holds an earlier run: --resume goes on with it, --output names another.")


def training_arguments(options: argparse.Namespace, rest: list[str], state: PartialState) -> TrainingArguments:
    told = DEFAULTS | {"output_dir": options.output, "use_cpu": state.device.type == "cpu"}
    told |= {options.precision: True} if options.precision != "fp32" else {}
    told |= {"save_only_model": options.sharded or options.tensor_parallel > 1}
    argv = [f"--{name}={value}" for name, value in told.items()]
    arguments = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*argv, *rest])[0]
    arguments.accelerator_config.dispatch_batches = False  # rows of one batch may be longer than those of another
    return arguments


def read_texts(options: argparse.Namespace) -> tuple[Callable[[], Iterator[str]], list[str]]:
    """What begins to read the texts to learn from, and the texts that are held out."""
    manual = Corpus(lambda: (document.text for document in python_manual()))
    corpus = Corpus.of_files(options.text) if options.text else manual
    corpus = replace(corpus, boilerplate=boilerplate_lines(corpus.read()), threshold=options.duplicates or None)
    held_out = list(islice(corpus.part(held_out=True), MOST_HELD_OUT))
    train = partial(corpus.part, held_out=False)
    if not options.stream:
        train = partial(iter, list(train()))
    if not held_out or not next(train(), None):
        raise ValueError("There are too few documents to hold one out: give more text.")
    return train, held_out


def make_tokenizer(options: argparse.Namespace, texts: Iterator[str], state: PartialState):
    """One process trains it, all load it; a resumed run has it."""
    folder = options.output / "tokenizer"
    if options.tokenizer == "bytes":
        return hf_arch.byte_tokenizer()
    if options.tokenizer:
        return AutoTokenizer.from_pretrained(options.tokenizer)
    if state.is_main_process and not (options.resume and folder.exists()):
        documents = (Document("", text) for text in islice(texts, SOME_TEXTS))
        train_tokenizer(documents, options.vocab_size).save_pretrained(folder)
    state.wait_for_everyone()
    return AutoTokenizer.from_pretrained(folder)


def make_model(options: argparse.Namespace, task: Objective, state: PartialState):
    sizes = {"hidden_size": options.hidden_size, "intermediate_size": 4 * options.hidden_size}
    sizes |= {"num_attention_heads": max(options.hidden_size // 32, 1), "num_hidden_layers": options.layers}
    model = task.row.load(task.head)(task.config(**(sizes | options.fields)))
    if options.word_vectors:
        state.print(hf_arch.load_word_vectors(model, task.tokenizer, options.word_vectors))
    if options.sharded or options.tensor_parallel > 1:
        model = sharded(model, options.output / "untrained", state, options.tensor_parallel)
    return model


def trained(options, task: Objective, arguments: TrainingArguments, rows, rate: float, state: PartialState) -> Trainer:
    """One run, into a folder of its own; `rate` is that of the noise."""
    folder = options.output / (f"noise-{rate}" if rate else "plain")
    set_seed(arguments.seed)
    told, collator = copy(arguments), task.noisy(rate) if rate else task.collator
    told.output_dir = str(folder)
    model = make_model(options, task, state)
    trainer = Trainer(model, told, collator, train_dataset=rows, processing_class=task.tokenizer)
    last = get_last_checkpoint(folder) if options.resume and folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(folder / "model")
    return trainer


def n_grams(tokenizer, train: Iterator[str], held_out: list[str]) -> dict[str, float]:
    """Nats per token of held-out text, by counts of the same tokens."""

    def tokens(texts) -> np.ndarray:
        found = chain.from_iterable(token_documents(iter(texts), tokenizer, begin=False))
        return np.fromiter(chain([tokenizer.eos_token_id], islice(found, SOME_TOKENS)), dtype=np.int64)

    learned, asked = tokens(train), tokens(held_out)
    return {name: NGram(learned, n, len(tokenizer)).loss(asked) for name, n in (("bigram", 2), ("trigram", 3))}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Nats per asked token of the n-gram models and of ours."""
    options, rest = read_options(argv)
    state = PartialState(cpu=not torch.accelerator.is_available())
    check(options, state)
    arguments = training_arguments(options, rest, state)
    train, held_out = read_texts(options)
    tokenizer = make_tokenizer(options, train(), state)
    task = objective(options.objective, hf_arch.find(options.architecture), tokenizer, options.length)
    rows = streamed(lambda: task.rows(train())) if options.stream else list(task.rows(train()))
    asked = list(task.rows(held_out))

    figures, seconds = n_grams(tokenizer, train(), held_out), {}
    for rate in dict.fromkeys((0.0, options.augment)):
        name, started = options.architecture + (f", noise {rate:.0%}" if rate else ""), time.perf_counter()
        trainer = trained(options, task, arguments, rows, rate, state)
        nats, count = task.loss(trainer.model, asked)
        figures[name], seconds[name] = nats / count, time.perf_counter() - started

    state.print(f"{len(held_out)} held-out documents, {count:,} tokens asked. Objective: {options.objective}.")
    every = options.objective == "causal"  # token is asked, and so every byte is said
    size = sum(len(text.encode()) for text in held_out)
    state.print(f"{'':32}nats / token" + "  bits / byte" * every + "  seconds")
    for name, nats in figures.items():
        bits = f"{nats * count / math.log(2) / size:13.3f}" * every
        state.print(f"{name:32}{nats:12.3f}{bits}" + (f"{seconds[name]:9.0f}" if name in seconds else ""))
    return figures


if __name__ == "__main__":
    main()
