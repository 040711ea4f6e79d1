"""Search by meaning in Python's reference manual: `python examples/semantic_search.py`; needs the extra `examples`.

The manual, which every Python carries, is cut into passages. From each a sentence is taken out, to ask for the passage
later; the other sentences, each with its passage, are what a small encoder learns from, with no words from elsewhere
(the inverse cloze task: Lee et al., 2019, arXiv:1906.00300). Beside it: TF-IDF, which matches words, and both together.
"""

import random
import re
from tempfile import TemporaryDirectory

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import TrainingArguments

import hf_arch
from hf_arch.demo.text import Document, python_manual, without_repeats
from hf_arch.demo.tokens import train_tokenizer

HEADING = re.compile(r"^(.+)\n[*=~\-^]{3,}$", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"“])|\n\s*\n")
PASSAGE = 400  # characters, and the rest of a sentence
QUESTIONS = [
    "Which exceptions does a try statement catch?",
    "How is the value of a default parameter computed?",
    "What is the order in which operands are evaluated?",
]
HAT = hf_arch.find("hat")
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "hidden_dropout": 0.1}
LENGTH, VOCABULARY = 96, 4000  # tokens

Pair = dict[str, str]


def passages() -> list[tuple[str, list[str]]]:
    """Parts of sections: the heading, and some sentences that stand together."""
    found = []
    for document in without_repeats(python_manual()):
        _, *parts = HEADING.split(document.text)
        for heading, text in zip(parts[::2], parts[1::2], strict=True):
            sentences: list[str] = []
            for sentence in filter(None, (" ".join(each.split()) for each in SENTENCE_END.split(text))):
                if not sentences or sum(map(len, sentences)) > PASSAGE:
                    found.append((heading, sentences := []))
                sentences.append(sentence)
    return found


def pairs() -> tuple[list[Pair], list[Pair]]:
    """Sentences with their passages: to learn from, and of each passage one held out."""
    draw, train, held_out = random.Random(0), [], []
    for heading, sentences in passages():
        told = [sentence for sentence in sentences if 6 <= len(sentence.split()) <= 40]
        if len(told) < 2:
            continue
        asked = draw.choice(told)
        rest = [sentence for sentence in sentences if sentence != asked]
        held_out.append({"query": asked, "positive": " ".join([f"{heading}.", *rest])})
        train.append({"query": heading, "positive": " ".join(rest)})
        for sentence in told:
            if sentence != asked:
                others = (other for other in rest if other != sentence)
                train.append({"query": sentence, "positive": " ".join([f"{heading}.", *others])})
    return train, held_out


def make_trainer(train: list[Pair], held_out: list[Pair], folder: str, **options) -> hf_arch.ContrastiveTrainer:
    """Of an encoder that pools what it reads by attention: HAT with one level."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Document("", pair["positive"]) for pair in train], VOCABULARY)
    processor = HAT.load("Processor")(tokenizer, segment_length=LENGTH, max_segments=1)
    sizes = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    model = HAT.load("Model")(HAT.load("Config").han(num_levels=1, reads="level", **sizes))
    told = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 64, "learning_rate": 3e-3}
    told |= {"warmup_steps": 20, "report_to": [], "remove_unused_columns": False}
    return hf_arch.ContrastiveTrainer(
        model,
        TrainingArguments(folder, **told, **options),
        data_collator=hf_arch.ContrastiveCollator(processor),
        train_dataset=train,
        eval_dataset=held_out,
    )


def vectors(trainer: hf_arch.ContrastiveTrainer, pairs: list[Pair]) -> list[torch.Tensor]:
    """Of queries, and of passages."""
    return [torch.as_tensor(each) for each in trainer.predict(pairs).predictions]


if __name__ == "__main__":
    train, held_out = pairs()
    words = TfidfVectorizer(sublinear_tf=True).fit([pair["positive"] for pair in held_out])
    by_words = [torch.tensor(words.transform([pair[name] for pair in held_out]).toarray()) for name in held_out[0]]
    with TemporaryDirectory() as folder:
        trainer = make_trainer(train, held_out, folder, num_train_epochs=3, logging_steps=20, save_strategy="no")
        before = vectors(trainer, held_out)
        trainer.train()
        after = vectors(trainer, held_out)
        asked, _ = vectors(trainer, [{"query": question, "positive": question} for question in QUESTIONS])
    both = [torch.cat((one, other / 2**0.5), dim=1) for one, other in zip(by_words, after, strict=True)]
    print(f"{len(held_out)} held-out sentences, and their passages: recall at 1, 5 and 10")
    for name, found in {"untrained": before, "trained": after, "TF-IDF": by_words, "both": both}.items():
        print(f"{name:10}", *(f"{hf_arch.recall_at(*found, k):6.1%}" for k in (1, 5, 10)))
    of_words = torch.tensor(words.transform(QUESTIONS).toarray())
    scores = torch.cat((of_words, asked / 2**0.5), dim=1) @ both[1].T
    for question, of_passages in zip(QUESTIONS, scores, strict=True):
        best = of_passages.topk(3)
        print(question)
        for score, place in zip(*best, strict=True):
            print(f"  {score:.2f} {held_out[place]['positive'][:100]}")
