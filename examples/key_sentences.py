"""The key sentences of a licence: `python examples/key_sentences.py`.

Nobody has marked them, so that a rule stands in (weak labels). The first sentence of a docstring is its summary (PEP
257), and the first one under a heading of Python's manual says what the section is about: they are the key sentences of
a text, which is told without its headings. HAT reads a text as segments, a sentence each, and learns to tell the key
ones; beside it the first sentences of a text, and the longest. Then it reads the licence of transformers.
"""

import random
import re
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import hf_arch
from hf_arch.demo.text import Document, python_manual, without_repeats
from hf_arch.demo.tokens import train_tokenizer

HEADING = re.compile(r"^.+\n[*=~\-^]{3,}$", re.MULTILINE)
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.;:])\s+(?=[A-Z(\"“])|\n\s*\n")
MOST = 32  # sentences of a text
SUMMARY = 4  # sentences
LENGTH, SEGMENTS, VOCABULARY = 48, 128, 4000  # tokens of a segment, segments of a text, tokens in all
HAT = hf_arch.find("hat")
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "hidden_dropout": 0.1}
SIZES |= {"layer_types": ["level_0", "pool_0", "level_1", "level_1"], "num_hidden_layers": 4}
SIZES |= {"feed_forward_types": ["dense", "none", "dense", "dense"]}

Text = tuple[list[str], list[float]]  # sentences, and of each whether it is key


def sentences(text: str) -> list[str]:
    found = (" ".join(sentence.split()) for sentence in SENTENCE_END.split(text))
    return [sentence for sentence in found if len(sentence.split()) >= 4]


def texts_of(sections: list[str]) -> list[Text]:
    """Sections of three sentences and more, one after another."""
    found = [([], [])]
    for said in filter(lambda said: len(said) > 2, map(sentences, sections)):
        if len(found[-1][0]) + len(said) > MOST:
            found.append(([], []))
        for part, more in zip(found[-1], (said, [1.0] + [0.0] * (len(said) - 1)), strict=True):
            part.extend(more[:MOST])
    return [text for text in found if sum(text[1]) > 1]


def texts() -> list[Text]:
    """Of the manual, and of the modules of Python."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    documents = [HEADING.split(document.text) for document in without_repeats(python_manual())]
    documents += [DOCSTRING.findall(path.read_text("utf-8")) for path in modules]
    return [text for sections in documents for text in texts_of(sections)]


def licence() -> list[str]:
    package = distribution("transformers")
    path = next(path for path in package.files if path.name.startswith("LICENSE"))
    return sentences(Path(package.locate_file(path)).read_text("utf-8"))


def precision(texts: list[Text], scores: list) -> float:
    """Of as many sentences as are key, those with the greatest scores: the share that are key."""
    found = []
    for (_, key), score in zip(texts, scores, strict=True):
        best = np.argsort(-np.asarray(score), kind="stable")[: int(sum(key))]
        found += np.take(key, best).tolist()
    return float(np.mean(found))


def trained(texts: list[Text], folder: str, **options):
    """A function that says of each sentence of some texts how much it is a key sentence."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Document("", " ".join(said)) for said, _ in texts], VOCABULARY)
    processor = HAT.load("Processor")(tokenizer, segment_length=LENGTH, max_segments=SEGMENTS)
    sizes = {"vocab_size": VOCABULARY, "segment_lengths": [LENGTH], "max_position_embeddings": LENGTH * SEGMENTS}
    model = HAT.load("ForSegmentClassification")(HAT.load("Config")(num_labels=1, **SIZES, **sizes))

    def read(texts: list[Text]) -> list[dict]:
        told = processor([said for said, _ in texts], segment_labels=[key for _, key in texts])
        return [{name: told[name][i] for name in told} for i in range(len(texts))]

    arguments = TrainingArguments(folder, learning_rate=3e-3, warmup_steps=20, report_to=[], **options)
    trainer = Trainer(model, arguments, data_collator=DataCollatorWithPadding(processor), train_dataset=read(texts))
    trainer.train()

    def scores(texts: list[Text]) -> list[np.ndarray]:
        (logits, _), labels, _ = trainer.predict(read(texts))
        return [row[asked != -100, 0] for row, asked in zip(logits, labels, strict=True)]

    return scores


if __name__ == "__main__":
    every = texts()
    random.Random(0).shuffle(every)
    train, held_out = [text for place, text in enumerate(every) if place % 4], every[::4]
    with TemporaryDirectory() as folder:
        options = {"num_train_epochs": 5, "per_device_train_batch_size": 4, "logging_steps": 60, "save_strategy": "no"}
        scores = trained(train, folder, **options)
        found = {"HAT": scores(held_out), "the longest": [[len(each) for each in said] for said, _ in held_out]}
        found["the first"] = [[-place for place in range(len(said))] for said, _ in held_out]
        text = [sentence for sentence in licence() if len(sentence.split()) > 9]  # no headings
        (of_licence,) = scores([(text, [0.0] * len(text))])
    often = np.concatenate([key for _, key in held_out]).mean()
    print(f"{len(held_out)} held-out texts, {often:.1%} of whose sentences are key; of those chosen there are key")
    print(*(f"{precision(held_out, chosen):6.1%} if it is {name}" for name, chosen in found.items()), sep="\n")
    print("The licence of transformers:")
    print(*(f"  {text[place]}" for place in sorted(np.argsort(-of_licence)[:SUMMARY])), sep="\n")
