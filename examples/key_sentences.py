"""The key sentences of a licence: `python examples/key_sentences.py`; needs the extra `examples`.

No one has marked them, so that a rule stands in (weak labels): the three sentences of a text whose words are most like
those of all others, by the cosine of TF-IDF vectors. HAT reads a text as segments, a sentence each, and learns from
Python's manual to tell such sentences by reading. It then reads a licence text of transformers, which is no manual.
"""

import re
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import hf_arch
from hf_arch.demo.text import Document, python_manual, without_repeats
from hf_arch.demo.tokens import train_tokenizer

SENTENCE_END = re.compile(r"(?<=[.;:])\s+(?=[A-Z(\"“])|\n\s*\n")
KEY, FEWEST, MOST = 3, 8, 32  # sentences: of a summary, of a text at least, and of a part that is read
HAT = hf_arch.find("hat")
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
SIZES |= {"layer_types": ["level_0", "pool_0", "level_1", "level_1"], "feed_forward_types": ["dense", "none", "dense", "dense"]}
LENGTH, SEGMENTS, VOCABULARY = 48, 128, 4000

Text = list[str]  # its sentences


def sentences(text: str) -> Text:
    found = (" ".join(sentence.split()) for sentence in SENTENCE_END.split(text))
    return [sentence for sentence in found if len(sentence.split()) >= 6]


def likeness(text: Text) -> np.ndarray:
    """The cosine of each sentence's words with those of all others."""
    vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(text).toarray()
    others = vectors.sum(axis=0) - vectors
    return (vectors * others).sum(axis=1) / np.linalg.norm(others, axis=1)


def best(scores: np.ndarray) -> set[int]:
    return set(np.argsort(-np.asarray(scores), kind="stable")[:KEY].tolist())


def agreement(texts: list[Text], scores: list[np.ndarray]) -> float:
    """The share of key sentences that have the greatest scores."""
    return sum(len(best(likeness(text)) & best(found)) for text, found in zip(texts, scores)) / KEY / len(texts)


def manual() -> list[Text]:
    found = []
    for document in without_repeats(python_manual()):
        text = sentences(document.text)
        found += [text[start : start + MOST] for start in range(0, len(text), MOST)]
    return [text for text in found if len(text) >= FEWEST]


def licence() -> Text:
    package = distribution("transformers")
    (path,) = (path for path in package.files if path.name.startswith("LICENSE"))
    return sentences(Path(package.locate_file(path)).read_text("utf-8"))


def trained(texts: list[Text], folder: str, **options):
    """A function that says how much of a key sentence each sentence of some texts is."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Document("", " ".join(text)) for text in texts], VOCABULARY)
    processor = HAT.load("Processor")(tokenizer, segment_length=LENGTH, max_segments=SEGMENTS)
    sizes = {"vocab_size": VOCABULARY, "segment_lengths": [LENGTH], "max_position_embeddings": LENGTH * SEGMENTS}
    model = HAT.load("ForSegmentClassification")(HAT.load("Config")(num_labels=1, hidden_dropout=DROP, **SIZES, **sizes))

    def read(texts: list[Text]) -> list[dict]:
        labels = [[float(i in best(likeness(text))) for i in range(len(text))] for text in texts]
        told = processor(texts, segment_labels=labels)
        return [{name: told[name][i] for name in told} for i in range(len(texts))]

    arguments = TrainingArguments(folder, report_to=[], per_device_train_batch_size=4, **options)
    trainer = Trainer(model, arguments, data_collator=DataCollatorWithPadding(processor), train_dataset=read(texts))
    trainer.train()

    def scores(texts: list[Text]) -> list[np.ndarray]:
        (logits, _), labels, _ = trainer.predict(read(texts))
        return [row[asked != -100, 0] for row, asked in zip(logits, labels)]

    return scores


if __name__ == "__main__":
    import sys, time
    t=time.process_time()
    DROP=float(sys.argv[3])
    texts = manual()
    train, held_out = [text for i, text in enumerate(texts) if i % 4], texts[::4]
    print(len(train), len(held_out), sum(map(len,texts)), time.process_time()-t)
    print("lead", agreement(held_out,[-np.arange(len(x)) for x in held_out]), "longest", agreement(held_out, [np.array([len(s) for s in x]) for x in held_out]), "chance", np.mean([KEY/len(x) for x in held_out]))
    with TemporaryDirectory() as folder:
        scores = trained(train, folder, num_train_epochs=float(sys.argv[1]), learning_rate=float(sys.argv[2]), save_strategy="no", disable_tqdm=True, logging_strategy="epoch", warmup_steps=20, dataloader_pin_memory=False)
        print("train", agreement(train, scores(train)))
        print("ours", agreement(held_out, scores(held_out)))
        text = licence()
        (found,) = scores([text])
    print(len(text), agreement([text],[found]))
    for i in sorted(best(found)): print(" ", i, text[i])
    for i in sorted(best(likeness(text))): print(" R", i, text[i])
    print(time.process_time()-t)
