"""The four tasks of `adapters.py`: where their texts come from, what a model learns from them, and what is measured.

Key information in medical records and the sentiment of financial news: made texts (`made_texts.py`), or your own.
Legal prose: the licences of the installed packages. Questions about a document: the pages of `help()`
(`help_pages.py`). Of real texts whole documents are held out.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from operator import attrgetter, itemgetter
from pathlib import Path

from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

import help_pages
import hf_arch
import made_texts
from hf_arch.demo.ngrams import NGram
from hf_arch.demo.text import Document, read_files, split
from hf_arch.demo.tokens import Stream, Windows
from hf_arch.demo.training import measure

LENGTH = 128  # tokens of a window
LICENCE = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)
WORD = re.compile(r"\w+|[^\w\s]")
ANSWER = 40  # tokens, at most
MOST = 200  # questions that are held out

Figures = dict[str, float]


@dataclass(frozen=True)
class Task:
    """One of the four: `examples` are what they are made of, `features` what a model learns."""

    head: str  # of the Auto class
    pipeline: str
    texts: str  # what they are
    train: list
    held_out: list
    features: Callable[[object, list], list]  # (tokenizer, examples) -> items for a Trainer
    collator: Callable[[object], Callable]  # of a tokenizer
    baselines: Callable[[object, list, list], dict[str, Figures]]  # (tokenizer, train, held out) -> what is simple
    score: Callable[[object, list], Figures]  # (pipeline, held out)
    labels: tuple[str, ...] = ()
    read: Callable[[object], str] = itemgetter("text")  # of an example, what a base may learn
    request: Callable[[object], object] = itemgetter("text")  # and what the pipeline is asked

    @property
    def fields(self) -> dict:
        """Of the config."""
        named = dict(enumerate(self.labels))
        return {"id2label": named, "label2id": {label: i for i, label in named.items()}} if self.labels else {}


# Key information: examples are {"text", "entities": [{"start", "end", "label"}]}


def tagged(tokenizer, examples: list[dict], labels: tuple[str, ...]) -> list[dict]:
    """B-... for the first token of an entity, I-... for the others."""
    items = []
    for example in examples:
        told = tokenizer(example["text"], return_offsets_mapping=True, truncation=True, max_length=4 * LENGTH)
        places = told.pop("offset_mapping")
        names = [0] * len(places)
        for entity in example["entities"]:
            inside = [i for i, (start, end) in enumerate(places) if start < entity["end"] and end > entity["start"]]
            for i in inside:
                names[i] = labels.index(("B-" if i == inside[0] else "I-") + entity["label"])
        items.append({**told, "labels": names})
    return items


def f1(found: list[set], true: list[set]) -> float:
    """Of entities that are right to the character, with the right name."""
    right = sum(len(one & other) for one, other in zip(found, true, strict=True))
    return 2 * right / max(sum(map(len, found)) + sum(map(len, true)), 1)


def entities(example: dict) -> set[tuple[int, int, str]]:
    return {(each["start"], each["end"], each["label"]) for each in example["entities"]}


def score_entities(pipe, held_out: list[dict]) -> Figures:
    found = []
    for example, said in zip(held_out, pipe([each["text"] for each in held_out], batch_size=16), strict=True):
        text = example["text"]
        blanks = [len(text[one["start"] : one["end"]]) - len(text[one["start"] : one["end"]].lstrip()) for one in said]
        found.append({(o["start"] + blank, o["end"], o["entity_group"]) for o, blank in zip(said, blanks, strict=True)})
    return {"F1": f1(found, [entities(example) for example in held_out])}


def words_of(example: dict) -> tuple[list[dict], list[str], list[re.Match]]:
    """The words and their labels."""
    found = [*WORD.finditer(example["text"])]
    names = {i: each["label"] for each in example["entities"] for i in range(each["start"], each["end"])}
    return [{"word": match[0]} for match in found], [names.get(match.start(), "O") for match in found], found


def extraction_baselines(tokenizer, train: list[dict], held_out: list[dict]) -> dict[str, Figures]:
    """No entity at all; and what each word is most often, by logistic regression."""
    model = make_pipeline(DictVectorizer(), LogisticRegression(C=10, max_iter=300))
    told = [words_of(example)[:2] for example in train]
    model.fit(sum((words for words, _ in told), []), sum((names for _, names in told), []))
    found = []
    for example in held_out:
        words, _, matches = words_of(example)
        spans: list[list] = []
        for name, match in zip(model.predict(words), matches, strict=True):
            if spans and spans[-1][2] == name:
                spans[-1][1] = match.end()
            else:
                spans.append([match.start(), match.end(), name])
        found.append({tuple(span) for span in spans if span[2] != "O"})
    return {"guess": {"F1": 0.0}, "words": {"F1": f1(found, [entities(example) for example in held_out])}}


# Legal prose: examples are documents


def licences() -> list[Document]:
    """Of the installed packages."""
    paths = {}
    for package in distributions():
        named = [
            file for file in package.files or () if LICENCE.match(file.name) and file.suffix in ("", ".txt", ".md")
        ]
        paths |= {f"{package.name}/{file.name}": Path(file.locate()) for file in named}
    return [Document(name, path.read_text("utf-8", "ignore")) for name, path in paths.items() if path.is_file()]


def prose(tokenizer, documents: list[Document]) -> Windows:
    return Windows(Stream.of(documents, tokenizer), LENGTH)


def score_prose(pipe, held_out: list[Document]) -> Figures:
    return {"bits per byte": measure(pipe.model, Stream.of(held_out, pipe.tokenizer), LENGTH).bits_per_byte}


def prose_baselines(tokenizer, train: list[Document], held_out: list[Document]) -> dict[str, Figures]:
    """Bigrams and trigrams of the same tokens."""
    known, asked = Stream.of(train, tokenizer).tokens, Stream.of(held_out, tokenizer)
    losses = {name: NGram(known, n, len(tokenizer)).loss(asked.tokens) for name, n in (("guess", 2), ("words", 3))}
    return {name: {"bits per byte": asked.figures(loss).bits_per_byte} for name, loss in losses.items()}


# Sentiment: examples are {"text", "label"}


def labelled(tokenizer, examples: list[dict], labels: tuple[str, ...]) -> list[dict]:
    told = tokenizer([each["text"] for each in examples], truncation=True, max_length=4 * LENGTH)["input_ids"]
    return [{"input_ids": ids, "labels": labels.index(each["label"])} for ids, each in zip(told, examples, strict=True)]


def score_labels(pipe, held_out: list[dict]) -> Figures:
    said = pipe([each["text"] for each in held_out], batch_size=16)
    return {"accuracy": sum(o["label"] == e["label"] for o, e in zip(said, held_out, strict=True)) / len(held_out)}


def label_baselines(tokenizer, train: list[dict], held_out: list[dict]) -> dict[str, Figures]:
    """What is most frequent; and logistic regression on a bag of words."""
    (texts, labels), (asked, true) = (
        zip(*((e["text"], e["label"]) for e in part), strict=True) for part in (train, held_out)
    )
    often = Counter(labels).most_common(1)[0][0]
    model: Pipeline = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
    accuracy = model.fit(texts, labels).score(asked, true)
    return {"guess": {"accuracy": true.count(often) / len(true)}, "words": {"accuracy": accuracy}}


# Questions: examples are those of SQuAD, {"question", "context", "answers"}


def overlap(found: str, true: str) -> float:
    """F1 of the words of an answer, as SQuAD measures it."""
    said, asked = (Counter(WORD.findall(text.lower())) for text in (found, true))
    both = (said & asked).total()
    return 2 * both / max(said.total() + asked.total(), 1)


def score_answers(found: list[str], held_out: list[dict]) -> Figures:
    true = [each["answers"]["text"][0] for each in held_out]
    pairs = list(zip(found, true, strict=True))
    exact = sum(one.strip() == other for one, other in pairs) / len(pairs)
    return {"exact": exact, "F1": sum(overlap(*pair) for pair in pairs) / len(pairs)}


def score_questions(pipe, held_out: list[dict]) -> Figures:
    told = {"max_seq_len": LENGTH, "max_answer_len": ANSWER, "batch_size": 16}
    return score_answers([answer["answer"] for answer in pipe(held_out, **told)], held_out)


def question_baselines(tokenizer, train: list[dict], held_out: list[dict]) -> dict[str, Figures]:
    """The first line of the text; and of the others that which has most words of the question."""
    lines = [[line for line in each["context"].splitlines() if line.strip()] for each in held_out]
    nearest = [
        max(of_text, key=lambda line, asked=each["question"]: overlap(line, asked))
        for of_text, each in zip((of_text[1:] or of_text for of_text in lines), held_out, strict=True)
    ]
    found = {"guess": [of_text[0] for of_text in lines], "words": nearest}
    return {name: score_answers(answers, held_out) for name, answers in found.items()}


# All four


def made(make: Callable[[random.Random, bool], dict], count: int) -> tuple[list, list]:
    """To learn from and, with other names, to hold out."""
    draw = random.Random(0)
    return [make(draw, False) for _ in range(count)], [make(draw, True) for _ in range(count // 5)]


def read_lines(path: str) -> tuple[list, list]:
    """A file with an example to a line, in JSON; every fifth is held out."""
    examples = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    return [each for i, each in enumerate(examples) if i % 5], examples[::5]


def asked_of_python() -> tuple[list, list]:
    """The questions about every fifth module are held out."""
    pages = list(help_pages.help_pages().values())
    random.Random(0).shuffle(pages)
    return sum((page for i, page in enumerate(pages) if i % 5), []), sum(pages[::5], [])[:MOST]


def tasks(records: str | None, text: list[str] | None, news: str | None, questions: str | None) -> dict[str, Task]:
    """Each with its own texts, or those of the files."""
    told = read_lines(records) if records else made(made_texts.record, 1000)
    kinds = sorted({each["label"] for part in told for example in part for each in example["entities"]})
    tags = ("O", *(f"{place}-{kind}" for kind in kinds for place in "BI"))
    lines = read_lines(news) if news else made(made_texts.headline, 1500)
    names = tuple(sorted({example["label"] for part in lines for example in part}))
    new = hf_arch.NearDuplicates(threshold=0.5)  # most licences are one of a few
    prose_of = split(
        "legal text", [each for each in (read_files(text) if text else licences()) if new.is_new(each.text)]
    )
    asked = read_lines(questions) if questions else asked_of_python()
    return {
        "extraction": Task(
            "ForTokenClassification",
            "token-classification",
            f"medical records, {records or 'made by a generator'}",
            *told,
            partial(tagged, labels=tags),
            DataCollatorForTokenClassification,
            extraction_baselines,
            score_entities,
            tags,
        ),
        "legal": Task(
            "ForCausalLM",
            "text-generation",
            "licences of the installed packages" if not text else ", ".join(text),
            prose_of.train,
            prose_of.held_out,
            prose,
            lambda tokenizer: default_data_collator,
            prose_baselines,
            score_prose,
            read=attrgetter("text"),
            request=lambda document: document.text[:60],
        ),
        "sentiment": Task(
            "ForSequenceClassification",
            "text-classification",
            f"financial news, {news or 'made by a generator'}",
            *lines,
            partial(labelled, labels=names),
            DataCollatorWithPadding,
            label_baselines,
            score_labels,
            names,
        ),
        "questions": Task(
            "ForQuestionAnswering",
            "question-answering",
            questions or "help() on Python's own functions",
            *asked,
            partial(hf_arch.answer_features, length=LENGTH),
            DataCollatorWithPadding,
            question_baselines,
            score_questions,
            read=itemgetter("context"),
            request=lambda example: {name: example[name] for name in ("question", "context")},
        ),
    }
