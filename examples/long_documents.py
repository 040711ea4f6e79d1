"""Which library does a long text document? `python examples/long_documents.py`; needs the extra `examples`.

A document is what the docstrings of one module say, thousands of tokens, without the lines of code that would give it
away. The libraries are Python's own and five that hf_arch needs, so that nothing is downloaded. A hierarchical
attention network reads documents in segments and learns to name their library; beside it stand a bag of words, and
the same network when it sees the beginning alone.
"""

import random
import re
import sysconfig
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import hf_arch
from hf_arch.demo.text import Document
from hf_arch.demo.tokens import train_tokenizer

LIBRARIES = ["python", "numpy", "sympy", "networkx", "torch", "transformers"]
CODE = re.compile(r"\s*(>>>|\.\.\. )")
LEAST, MOST = 6_000, 60_000  # characters of a document
SEGMENT, SEGMENTS = 128, 32  # tokens of a segment, segments of a document: what goes beyond them is cut
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}

HAT = hf_arch.find("hat")
Example = tuple[str, int]  # a document, and the place of its library in LIBRARIES


def documents(library: str) -> list[str]:
    """Of each module that documents much, what it says."""
    root = sysconfig.get_path("stdlib") if library == "python" else find_spec(library).submodule_search_locations[0]
    paths = [path for path in sorted(Path(root).rglob("*.py")) if "site-packages" not in path.relative_to(root).parts]
    strings = (re.findall(r'"""(.*?)"""', path.read_text("utf-8", "ignore"), re.DOTALL) for path in paths)
    texts = ("\n".join(line for line in "\n".join(said).splitlines() if not CODE.match(line)) for said in strings)
    return [text for text in texts if LEAST < len(text) < MOST]


def examples(of_each: int = 60) -> tuple[list[Example], list[Example]]:
    """To learn from, and every fourth held out."""
    draw, found = random.Random(0), []
    for label, library in enumerate(LIBRARIES):
        texts = documents(library)
        found += [(text, label) for text in draw.sample(texts, min(of_each, len(texts)))]
    draw.shuffle(found)
    return [example for place, example in enumerate(found) if place % 4], found[::4]


def bag_of_words(train: list[Example], held_out: list[Example]) -> float:
    """Accuracy of logistic regression."""
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
    return model.fit(*zip(*train, strict=True)).score(*zip(*held_out, strict=True))


def trained(train: list[Example], folder: str, vocab_size: int = 6000, **options):
    """The Trainer when it is done, and a function that prepares examples for it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Document("", text) for text, _ in train], vocab_size)
    processor = HAT.load("Processor")(tokenizer, segment_length=SEGMENT)
    sizes = {"vocab_size": vocab_size, "segment_lengths": [SEGMENT], "max_position_embeddings": SEGMENT * SEGMENTS}
    config = HAT.load("Config").han(reads="level", num_labels=len(LIBRARIES), **SIZES, **sizes)

    def read(examples: list[Example], segments: int = SEGMENTS) -> list[dict]:
        processor.max_segments = segments
        return [dict(processor(text, truncation=True)) | {"labels": label} for text, label in examples]

    trainer = Trainer(
        HAT.load("ForSequenceClassification")(config),
        TrainingArguments(
            folder, learning_rate=3e-3, per_device_train_batch_size=4, warmup_steps=20, report_to=[], **options
        ),
        data_collator=DataCollatorWithPadding(processor),
        train_dataset=read(train),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
    )
    trainer.train()
    return trainer, read


if __name__ == "__main__":
    train, held_out = examples()
    with TemporaryDirectory() as folder:
        trainer, read = trained(train, folder, num_train_epochs=4, logging_steps=66, save_strategy="no")
        whole, part, first = (trainer.evaluate(read(held_out, most))["eval_accuracy"] for most in (SEGMENTS, 8, 1))
    length = sum(len(row["input_ids"]) for row in read(held_out)) / len(held_out)
    often = Counter(label for _, label in held_out).most_common(1)[0][1] / len(held_out)
    print(f"{len(held_out)} held-out documents of {length:.0f} tokens on average. The right library is named for")
    print(
        f"{whole:.1%} of them by HAT, {part:.1%} if it sees {8 * SEGMENT} tokens and {first:.1%} if it sees {SEGMENT},"
    )
    print(f"{bag_of_words(train, held_out):.1%} by logistic regression on their words,")
    print(f"{often:.1%} by saying what is most frequent.")
