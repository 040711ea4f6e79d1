"""Embeddings that begin as word vectors: which rows are set and to what, and what is said of damaged files."""

import gzip

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import hf_arch
from hf_arch.demo.text import Document
from hf_arch.demo.tokens import train_tokenizer
from hf_arch.word_vectors import read_word_vectors

ROW = hf_arch.find("transformer")
TEXT = "the cat and the dog and the cat sat on the mat " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("", TEXT)], 276)


def model_of(tokenizer, size=8, **fields):
    torch.manual_seed(0)
    config = ROW.tiny_config(
        "ForCausalLM", vocab_size=len(tokenizer), hidden_size=size, num_attention_heads=2, **fields
    )
    return ROW.load("ForCausalLM")(config)


def write(path, vectors, header=False):
    lines = [f"{len(vectors)} {len(next(iter(vectors.values())))}"] * header
    lines += [f"{word} {' '.join(map(repr, map(float, vector)))}" for word, vector in vectors.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def some_vectors(size, words=("cat", "the", "dogs", "...", "qqq")):
    draw = np.random.default_rng(0)
    return {word: draw.normal(size=size).astype(np.float32) for word in words}


@pytest.mark.parametrize("form", ["glove.txt", "word2vec.txt", "glove.txt.gz"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_words_and_means_of_words(tokenizer, tmp_path, form, tied):
    vectors = some_vectors(8)
    path = write(tmp_path / "vectors.txt", vectors, header=form.startswith("word2vec"))
    if form.endswith(".gz"):
        path = tmp_path / form
        path.write_bytes(gzip.compress((tmp_path / "vectors.txt").read_bytes()))
    model = model_of(tokenizer, tie_word_embeddings=tied)
    before = model.model.embed_tokens.weight.detach().clone()
    found = hf_arch.load_word_vectors(model, tokenizer, path)
    after = model.get_input_embeddings().weight.detach()

    ids = {word: tokenizer(word)["input_ids"] for word in (" cat", " the", " dogs", "dogs", "qqq", ".")}
    assert len(ids[" cat"]) == len(ids[" the"]) == 1 and len(ids[" dogs"]) > 1
    scale = after[ids[" the"][0]] / torch.tensor(vectors["the"])
    assert_close(scale, scale[:1].expand(8))  # one number for all of them
    assert_close(after[ids[" cat"][0]], scale * torch.tensor(vectors["cat"]))
    assert_close(after[tokenizer("q")["input_ids"][0]], scale * torch.tensor(vectors["qqq"]))
    changed = (after != before).any(1)
    assert int(changed.sum()) == found.words + found.pieces and 0 < found.words < found.pieces
    assert found.share == pytest.approx(changed.float().mean().item())
    assert "are words of the file" in str(found)
    assert not changed[tokenizer.all_special_ids].any()
    assert_close(after[changed].norm(dim=1).mean(), before.norm(dim=1).mean())
    assert torch.equal(model.lm_head.weight, after) == tied

    few = hf_arch.load_word_vectors(model_of(tokenizer), tokenizer, path, pieces=False)
    assert few.pieces == 0 and few.words == found.words


def test_wide_vectors_keep_their_distances(tokenizer, tmp_path):
    """Vectors of 20 numbers that lie in 6 dimensions: nothing is lost."""
    draw = np.random.default_rng(1)
    flat = draw.normal(size=(5, 6)) @ draw.normal(size=(6, 20))
    words = ("cat", "the", "and", "dog", "mat")
    path = write(tmp_path / "wide.txt", dict(zip(words, flat, strict=True)))
    model = model_of(tokenizer)
    hf_arch.load_word_vectors(model, tokenizer, path, pieces=False)
    known = {word: tokenizer(f" {word}")["input_ids"] for word in words}
    kept = [place for place, word in enumerate(words) if len(known[word]) == 1]
    assert len(kept) >= 3
    rows = model.get_input_embeddings().weight.detach()[[known[words[place]][0] for place in kept]]
    ratios = torch.pdist(rows) / torch.pdist(torch.tensor(flat[kept], dtype=torch.float32))
    assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_named(tokenizer, tmp_path):
    model = model_of(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    good = write(tmp_path / "good.txt", some_vectors(8)).read_text()
    words = "1 2 3 4 5 6 7 8"
    for content, told in {
        f"{good}bad 1 2 3\n": "line 6, is not a word and 8 numbers",
        f"{good}bad {words[:-1]}x\n": "line 6, is not a word and 8 numbers",
        f"{good}bad {words[:-1]}nan\n": "line 6, has a number that is not finite",
        f"7 8\n{good}": "promises 7 words in its first line and has 5",
        "word\n": "line 1, is not a word and 1 numbers",
        "": "holds no word vectors",
        f"qßx {words[:5]}\n": "have 3 numbers, the embeddings 8: take wider",
    }.items():
        path = tmp_path / "bad.txt"
        path.write_text(content)
        with pytest.raises(ValueError, match=told):
            hf_arch.load_word_vectors(model, tokenizer, path)
    path.write_bytes(b"3 8\nthe \x00\xff\x80")
    with pytest.raises(ValueError, match="line 2, is not UTF-8 text. A binary word2vec file"):
        hf_arch.load_word_vectors(model, tokenizer, path)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(good.encode())[:-9])
    with pytest.raises(ValueError, match="is damaged after line"):
        hf_arch.load_word_vectors(model, tokenizer, tmp_path / "cut.gz")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        hf_arch.load_word_vectors(model, tokenizer, tmp_path / "none")
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_words_may_hold_spaces(tmp_path):
    path = write(tmp_path / "vectors.txt", some_vectors(3, ("the", ". . .", "at name@domain.com")))
    assert [word for word, _ in read_word_vectors(path)] == ["the", ". . .", "at name@domain.com"]
