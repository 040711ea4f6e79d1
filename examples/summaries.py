"""The first line of a docstring, written from the rest of it: `python examples/summaries.py [--library NAME...]`; needs
the extra `examples`.

A document is what libraries say of a function or class, its name first and without lines of code; the line that sums it
up is what to write: real pairs, of which every Python carries thousands. A HAT encoder-decoder reads a document in
segments of whole sentences and writes (an abstractive summary). Beside it: the first sentence of the document, the
words of the name, and the summary of the most similar document that was learned from. They are compared by the words,
and pairs of words, that a summary shares with the true one (as ROUGE does: Lin, 2004, aclanthology W04-1013). Whether
it reads at all is seen in what the true line costs who is told its document, who is told another, and trigrams.
"""

import argparse
import random
import re
import sysconfig
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import hf_arch
from hf_arch.demo.ngrams import NGram
from hf_arch.demo.text import Document
from hf_arch.demo.tokens import train_tokenizer

LIBRARIES = ["python", "numpy", "scipy", "sklearn", "networkx", "sympy"]
DEFINITION = re.compile(r'^ *(?:def|class) (\w+)[^"]{,500}?:\n +[ruRU]?"""(.+?)"""', re.MULTILINE | re.DOTALL)
CODE = re.compile(r"\s*(>>>|\.\.\. )")
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
SENTENCE_END = re.compile(r"(?<=[.:])\s+(?=[A-Z`])")
LEAST, ASKED = 60, 200  # words of a document, and documents that are held out
SEGMENT, SEGMENTS, ANSWER = 48, 4, 20  # tokens of a segment, segments of a document, tokens of a summary
SIZES = {"vocab_size": 3000, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
SIZES |= {"encoder_num_hidden_layers": 2, "num_hidden_layers": 1, "hidden_dropout": 0.1, "initializer_range": 0.05}
READER, WRITER = hf_arch.find("hat"), hf_arch.find("hat_encoder_decoder")

Pair = tuple[str, str]  # a document, and its summary


def pairs(library: str) -> list[Pair]:
    """What a library documents at length, each with the line that sums it up."""
    root = sysconfig.get_path("stdlib") if library == "python" else find_spec(library).submodule_search_locations[0]
    found = {}
    for path in sorted(Path(root).rglob("*.py")):
        if {"site-packages", "test", "tests"} & {*path.relative_to(root).parts}:
            continue
        for name, said in DEFINITION.findall(path.read_text("utf-8", "ignore")):
            summary, _, rest = said.strip().partition("\n\n")
            text = " ".join(" ".join(line for line in rest.splitlines() if not CODE.match(line)).split())
            summary = " ".join(summary.split())
            if 4 <= len(summary.split()) <= 16 and len(text.split()) >= LEAST:
                found.setdefault(summary, f"{' '.join(WORD.findall(name)).lower()}. {text}")
    return [(text, summary) for summary, text in found.items()]


def overlap(found: str, wanted: str, length: int = 1) -> float:
    """F1 of the words that two texts share, or of so many words in a row."""
    parts = []
    for text in (found, wanted):
        words = re.findall(r"\w+", text.lower())
        parts.append(Counter(zip(*(words[start:] for start in range(length)), strict=False)))
    shared = sum((parts[0] & parts[1]).values())
    return 2 * shared / max(1, sum(parts[0].values()) + sum(parts[1].values()))


def trained(train: list[Pair], folder: str, **options):
    """A function that writes the summaries of some documents, and one that says what a token of the true ones costs."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Document("", f"{text} {summary}") for text, summary in train], SIZES["vocab_size"])
    processor = READER.load("Processor")(tokenizer, None, None, "sentence", SEGMENT, SEGMENTS)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    told = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad, "decoder_start_token_id": end}
    told |= {"segment_lengths": [SEGMENT], "max_position_embeddings": SEGMENT * SEGMENTS}
    model = WRITER.load("ForConditionalGeneration")(WRITER.load("Config")(**SIZES, **told))

    def read(text: str) -> dict:
        return dict(processor(text, truncation=True))

    def row(text: str, summary: str) -> dict:
        return read(text) | {"labels": [*tokenizer(summary)["input_ids"][: ANSWER - 1], end]}

    told = {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 50, "logging_steps": 100}
    told |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": ASKED}  # one batch: a mean over tokens
    told |= {"save_strategy": "no", "report_to": []}
    rows, collator = [row(*pair) for pair in train], DataCollatorWithPadding(processor)
    arguments = TrainingArguments(folder, **told | options)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows)
    trainer.train()

    @torch.no_grad()
    def write(texts: list[str]) -> list[str]:
        model.eval()
        batches = (texts[start : start + 32] for start in range(0, len(texts), 32))
        batches = (processor.pad([read(text) for text in batch], return_tensors="pt") for batch in batches)
        written = (model.generate(**batch, max_new_tokens=ANSWER, num_beams=2) for batch in batches)
        return [text for rows in written for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def costs(held_out: list[Pair]) -> dict[str, float]:
        own = [row(*pair) for pair in held_out]
        other = [{**one, "labels": this["labels"]} for one, this in zip(own[1:] + own[:1], own, strict=True)]
        known, asked = (np.array([end, *(token for one in part for token in one["labels"])]) for part in (rows, own))
        found = {"who reads the document": own, "who reads another one": other}
        found = {name: trainer.evaluate(part)["eval_loss"] for name, part in found.items()}
        return found | {"by trigrams of summaries": NGram(known, 3, len(tokenizer)).loss(asked)}

    return write, costs


def most_similar(train: list[Pair], texts: list[str]) -> list[str]:
    """The summary of the document that shares most words with each of some texts."""
    words = TfidfVectorizer(sublinear_tf=True).fit([text for text, _ in train])
    scores = words.transform(texts) @ words.transform([text for text, _ in train]).T
    return [train[place][1] for place in np.asarray(scores.argmax(axis=1)).ravel()]


def main(libraries: list[str], most: int = 2000, **options) -> tuple[dict[str, list[str]], dict[str, float]]:
    """What was written of the held-out documents, and what a token of the true line costs in nats."""
    every = [pair for library in libraries for pair in pairs(library)]
    random.Random(0).shuffle(every)
    asked = min(ASKED, len(every) // 10)
    if not asked:
        raise ValueError(f"The libraries sum up {len(every)} long docstrings in a line: name more, or larger ones.")
    held_out, train = every[:asked], every[asked : asked + most]
    texts, wanted = zip(*held_out, strict=True)
    with TemporaryDirectory() as folder:
        write, costs = trained(train, folder, **options)
        found, nats = {"HAT encoder-decoder": write(list(texts))}, costs(held_out)
    found["the most similar document's"] = most_similar(train, list(texts))
    found["the first sentence"] = [SENTENCE_END.split(text)[1] for text in texts]
    found["the words of the name"] = [text.partition(".")[0] for text in texts]
    length = sum(len(text.split()) for text in texts) / len(texts)
    print(
        f"{len(train)} pairs to learn from, {asked} held out, of {length:.0f} words. Words, and pairs, that are shared:"
    )
    for name, written in found.items():
        shares = [[overlap(*both, n) for both in zip(written, wanted, strict=True)] for n in (1, 2)]
        print(f"{name:28}", *(f"{sum(share) / asked:6.1%}" for share in shares))
    print("Nats that a token of the true line costs", *(f"{name} {cost:.2f}" for name, cost in nats.items()), sep=", ")
    for place in range(3):
        print(f"{texts[place][:100]} ...\n  wanted:  {wanted[place]}")
        print(f"  written: {found['HAT encoder-decoder'][place]}")
    return found, nats


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--library", nargs="+", default=LIBRARIES, metavar="NAME", help="that can be imported here")
    parser.add_argument("--pairs", type=int, default=2000, help="to learn from, at most")
    parser.add_argument("--epochs", type=float, default=3)
    told = parser.parse_args()
    main(told.library, told.pairs, num_train_epochs=told.epochs)
