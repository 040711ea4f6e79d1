"""From files to rows: what cleaning, duplicates, packing, noise and reading promise, each against its definition."""

import gzip
import json
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.testing import assert_close

import hf_arch
from hf_arch.collators import SpanCorruptionCollator
from hf_arch.corpus.cleaning import boilerplate_lines, clean, normalise, squeeze
from hf_arch.corpus.duplicates import MinHash, NearDuplicates, SeenParagraphs, jaccard, shingles
from hf_arch.corpus.noise import NoisyCollator
from hf_arch.corpus.packing import pack, pieces
from hf_arch.corpus.streaming import Corpus, read_documents, streamed
from hf_arch.streams import collate_segments
from promises import Case

WORDS = [f"word{number}" for number in range(500)]


def text_of(draw, count):
    return " ".join(draw.choice(WORDS, count))


def test_texts_in_one_form():
    assert (
        normalise("cafe\u0301\u00a0\u200bau\ufeff lait\x07\r\nnext\x0bline\u2028end") == "café au lait\nnext\nline\nend"
    )
    assert normalise("क\u200dष 👩\u200d💻\tx") == "क\u200dष 👩\u200d💻\tx"  # joiners mean something
    assert squeeze("  a  b \t\n\n\n\n    c\t\td  \n\n") == "  a b\n\n    c d"
    pages = [f"Home | About\n\nPage {number} says {number}.\n---\n© All rights reserved" for number in range(20)]
    lines = boilerplate_lines(pages)
    assert lines == {"Home | About", "© All rights reserved"}
    assert clean(pages[3], lines) == "Page 3 says 3.\n---"
    assert clean("\x00\u200b \n", lines) == ""
    assert boilerplate_lines(pages[:4]) == frozenset()  # of too few to tell


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_signatures_estimate_the_jaccard_similarity(share):
    draw = np.random.default_rng(0)
    one = draw.choice(10**12, 1000, replace=False).astype(np.uint64)
    both = int(round(2000 * share / (1 + share)))
    other = np.concatenate((one[:both], draw.choice(10**12, 1000 - both, replace=False).astype(np.uint64) + 10**12))
    truth = jaccard(one, other)
    assert truth == pytest.approx(both / (2000 - both), abs=1e-9)
    minhash = MinHash(size=512)
    error = np.sqrt(truth * (1 - truth) / 512)
    assert abs((minhash(one) == minhash(other)).mean() - truth) <= 4 * error


def test_shingles_are_the_runs_of_eight_bytes():
    text = "The  Cat\nsat on the mat, thé cat."
    told = " ".join(text.lower().split()).encode()
    expected = {int.from_bytes(told[start : start + 8], "little") for start in range(len(told) - 7)}
    assert set(map(int, shingles(text))) == expected
    assert len(shingles("a")) == len(shingles("")) == 1


def test_near_duplicates_are_found_and_nothing_else():
    """Fifty texts of one vocabulary, and each again with two of its hundred words changed."""
    draw = np.random.default_rng(1)
    texts = [text_of(draw, 100) for _ in range(50)]
    changed = []
    for text in texts:
        words = text.split()
        for place in draw.choice(100, 2, replace=False):
            words[place] = "other"
        changed.append("\n ".join(words).upper())
    truth = [jaccard(shingles(one), shingles(other)) for one, other in zip(texts, changed, strict=True)]
    assert min(truth) > 0.85 and jaccard(shingles(texts[0]), shingles(texts[1])) < 0.5
    near = NearDuplicates(0.8)
    assert near.rows == 8 and near.compared(0.8, 128, 8) > 0.9 > near.compared(0.8, 128, 16)
    assert all(map(near.is_new, texts))
    assert sum(map(near.is_new, changed)) <= 2
    assert all(map(NearDuplicates(1.0).is_new, dict.fromkeys(texts + changed)))
    with pytest.raises(ValueError, match="threshold is 0"):
        NearDuplicates(0)


def test_duplicates_in_datasets_and_their_memory():
    draw = np.random.default_rng(2)
    texts = [text_of(draw, 30) for _ in range(60)]
    rows = {"text": texts + texts[:20]}
    kept = Dataset.from_dict(rows).filter(NearDuplicates().is_new, input_columns="text")
    assert kept["text"] == texts
    stream = Dataset.from_dict(rows).to_iterable_dataset().filter(NearDuplicates().is_new, input_columns="text")
    assert [row["text"] for row in stream] == texts
    tracemalloc.start()
    near = NearDuplicates()
    assert all(map(near.is_new, texts))
    size = tracemalloc.get_traced_memory()[0] / len(texts)
    tracemalloc.stop()
    assert 500 < size < 5000


def test_paragraphs_count_once():
    seen = SeenParagraphs()
    assert seen.new_part("One.\n\nTwo  two.\n \nThree.") == "One.\n\nTwo  two.\n\nThree."
    assert seen.new_part("two TWO.\n\nFour.\n\nFour.") == "Four."
    assert seen.new_part("One.\n\nFour.") == ""


def test_packed_rows_lose_no_token_and_no_place():
    draw = np.random.default_rng(0)
    documents = [draw.integers(3, 90, size).tolist() for size in (5, 1, 40, 2, 17, 9, 33)]
    rows = list(pack(documents, 16))
    assert {len(values) for row in rows for values in row.values()} == {16}
    asked = [(one, next_) for document in documents for one, next_ in zip(document, document[1:], strict=False)]
    told = [
        pair
        for row in rows
        for *pair, real in zip(row["input_ids"], row["labels"], row["attention_mask"], strict=True)
        if real
    ]
    assert list(map(tuple, told)) == asked
    assert sum(16 - sum(row["attention_mask"]) for row in rows) < 16  # padding at the very end alone
    for row in rows[:-1]:
        begins = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        assert begins[0] == 0 and all(
            row["labels"][place - 1] != row["input_ids"][place] or place == 0 for place in begins
        )
    assert [piece["input_ids"] for piece in pieces([[1] * 9, [2], [3, 4]], 4)] == [[1] * 3] * 3 + [[3, 4]]
    assert sum((piece["input_ids"] for piece in pieces(documents, 7)), []) == sum(documents[:1] + documents[2:], [])


@torch.no_grad()
def test_packed_documents_are_read_as_if_alone():
    row = next(row for row in hf_arch.ARCHITECTURES if row.name == "retnet")
    model = Case(row, "ForCausalLM").build()
    draw = np.random.default_rng(0)
    documents = [draw.integers(3, 90, size).tolist() for size in (6, 11, 4, 9)]
    packed = collate_segments(list(pack(documents, 26)))
    assert packed["input_ids"].shape == (1, 26)
    alone = [model(torch.tensor([document[:-1]])).logits[0] for document in documents]
    assert_close(model(**packed).logits[0], torch.cat(alone))


VOCABULARY, SPECIAL = range(10, 90), [0, 1, 2]


def noisy(rate, collator=collate_segments, **fields):
    torch.manual_seed(0)
    return NoisyCollator(collator, rate, VOCABULARY, SPECIAL, **fields)


def packed_batch():
    """Each token is followed by the next number, so that a true question is known by its answer."""
    documents = [[0, *range(10, 10 + size)] for size in (30, 20, 45, 25)]
    return list(pack(documents, 40))


@pytest.mark.parametrize("way", ["replace", "delete", "insert"])
def test_noise_leaves_true_questions(way):
    rows = packed_batch()
    clean_batch, batch = collate_segments(rows), noisy(0.3, ways=[way])(rows)
    assert {name: x.shape for name, x in batch.items()} == {name: x.shape for name, x in clean_batch.items()}
    ids, asked, real = batch["input_ids"], batch["shift_labels"], batch["attention_mask"] > 0
    starts = (batch["position_ids"] == 0) & real
    assert torch.equal(batch["position_ids"][:, 0], torch.zeros(len(ids), dtype=torch.long))
    if way == "replace":
        assert torch.equal(asked, clean_batch["shift_labels"])
        changed = (ids != clean_batch["input_ids"])[real].float().mean()
        assert 0.2 < changed < 0.35 and torch.equal(starts, (clean_batch["position_ids"] == 0) & real)
        return
    told = real & (asked != -100)
    follows = (asked == ids + 1) | (ids == 0)  # also where what follows was deleted
    assert follows[told].all()
    count = {
        name: int((each["attention_mask"] > 0).sum()) for name, each in {"then": clean_batch, "now": batch}.items()
    }
    if way == "delete":
        assert told[real].all() and 0.6 < count["now"] / count["then"] < 0.85
        assert (ids[real] == 0).sum() == (clean_batch["input_ids"] == 0).sum() - (
            ~(clean_batch["attention_mask"] > 0)
        ).sum()
    else:
        assert 0.15 < (~told & real).sum() / real.sum() < 0.3 and count["now"] >= count["then"]
    for row, begin in zip(batch["position_ids"], starts, strict=True):
        steps = row.diff()[: int(real.sum(1).min()) - 1]
        assert ((steps == 1) | begin[1 : len(steps) + 1]).all()


def test_noise_does_not_touch_what_is_asked_or_answered():
    rows = [{"input_ids": list(range(10, 74))}] * 6
    spans = SpanCorruptionCollator(pad_token_id=0, sentinel_token_ids=range(99, 89, -1), eos_token_id=1, seed=0)
    plain = spans(rows)
    spans.drawn = None
    along = ("input_ids", "attention_mask")
    batch = noisy(0.4, spans, along=along, ways=["replace", "delete"])(rows)
    assert torch.equal(batch["labels"], plain["labels"]) and not torch.equal(batch["input_ids"], plain["input_ids"])
    batch = noisy(0.0)(packed_batch())
    assert torch.equal(batch["input_ids"], collate_segments(packed_batch())["input_ids"])

    def masked(items):
        ids = torch.tensor([item["input_ids"] for item in items])
        labels = ids.masked_fill(torch.rand(ids.shape) > 0.2, -100)
        return {"input_ids": ids.masked_fill(labels > 0, 2), "labels": labels, "attention_mask": torch.ones_like(ids)}

    batch = noisy(0.4, masked)(rows)
    hidden = batch["labels"] != -100
    assert (
        hidden.sum() > 40 and (batch["input_ids"][hidden] == 2).all() and not (batch["input_ids"][~hidden] == 2).any()
    )
    with pytest.raises(ValueError, match="rate is 1"):
        noisy(1.0)
    with pytest.raises(ValueError, match="ways has swap"):
        noisy(0.1, ways=["swap"])


def test_files_are_read_whatever_their_form(tmp_path):
    text = "Erste Zeile ä\nzweite\n<|endoftext|>\nSecond.\n\fthird"
    plain, packed, lines = (tmp_path / name for name in ("a.txt", "a.txt.gz", "a.jsonl"))
    plain.write_text(text.replace("\f", "\f\n"))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    lines.write_text('{"text": "one"}\n\n{"text": "two\\nlines", "url": ""}\n')
    expected = ["Erste Zeile ä\nzweite\n", "Second.\n", "third"]
    assert list(read_documents(plain)) == list(read_documents(packed)) == expected
    assert list(read_documents(lines)) == ["one", "two\nlines"]
    plain.write_text("äöü€😀" * 50)  # a line that is too long is cut, between characters
    parts = list(read_documents(plain, longest=17))
    assert "".join(parts) == "äöü€😀" * 50 and max(map(len, parts)) <= 17

    broken = {
        "b.txt": b"fine\n\xff\xfe",
        "z.txt": b"a\n\0",
        "c.jsonl": b'{"text": "x"}\n{"t',
        "d.jsonl": b'{"text": 3}',
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}, line [12]"):
            list(read_documents(tmp_path / name))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-10])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        list(read_documents(tmp_path / "cut.txt.gz"))
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.txt"):
        list(read_documents(tmp_path / "none.txt"))


def test_a_file_larger_than_memory_is_streamed(tmp_path):
    """Nine megabytes, in memory for less than one."""
    path = tmp_path / "large.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for number in range(1000):
            file.write(json.dumps({"text": f"{number} " * 2000}) + "\n")
    corpus = Corpus.of_files([path], threshold=None, paragraphs=False)
    data = IterableDataset.from_generator(lambda: ({"size": len(text)} for text in corpus.part(held_out=False)))
    next(iter(data))
    tracemalloc.start()
    total = sum(row["size"] for row in islice(data, 600))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 4e6 and peak < 1e6


def test_a_corpus_can_be_read_again(tmp_path):
    draw = np.random.default_rng(3)
    texts = [f"{text_of(draw, 40)}\n\n{text_of(draw, 40)}" for _ in range(60)]
    repeated = [*texts, texts[3].upper(), texts[5].split("\n\n")[1]]
    corpus = Corpus(lambda: iter(repeated))
    apart, learned = list(corpus.part(held_out=True)), list(corpus.part(held_out=False))
    assert sorted(apart + learned) == sorted(texts) and 4 <= len(apart) <= 6
    assert list(corpus.part(held_out=False)) == learned
    rows = streamed(lambda: ({"text": text} for text in corpus.part(held_out=False)))
    twice = [[row["text"] for row in rows] for _ in range(2)]
    assert twice[0] == twice[1] != learned and sorted(twice[0]) == sorted(learned)
    rows.set_epoch(1)
    assert [row["text"] for row in rows] != twice[0]
