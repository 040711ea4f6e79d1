"""The demo end to end on a tiny scale, the arithmetic of its baselines and measures, and what it refuses."""

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_arch
from hf_arch.demo import run as demo
from hf_arch.demo.job import Job, Scale
from hf_arch.demo.ngrams import NGram
from hf_arch.demo.text import Document, cut, paragraphs, python_manual, split, without_repeats
from hf_arch.demo.tokens import Stream, Windows, train_tokenizer
from hf_arch.demo.training import Schedule, measure

TINY = Scale(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    length=32,
    base=Schedule(steps=3, learning_rate=1e-2, points=2),
    adapter=Schedule(steps=3, learning_rate=1e-2, points=2),
    rank=2,
    new_tokens=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def job(folder) -> Job:
    return demo.run(output=folder, scale=TINY)


def test_it_measures_each_step(job):
    assert [stage.name for stage in job.stages] == ["bigram", "trigram", "untrained", "base", "adapter", "merged"]
    losses = {stage.name: [figures.loss for figures in stage.figures] for stage in job.stages}
    assert losses["base"][0] < losses["untrained"][0]
    assert losses["adapter"][1] < losses["base"][1]
    assert losses["merged"] == pytest.approx(losses["adapter"], abs=1e-4)
    for stage in job.stages:
        for text, figures in zip(job.texts, stage.figures, strict=True):
            bits = figures.loss * (len(text.held_out.tokens) - 1) / math.log(2)
            assert figures.bits_per_byte == pytest.approx(bits / text.held_out.size)


def test_what_it_saves_is_whole(job):
    names = {path.name for path in job.folder.iterdir()}
    assert names == {"base", "adapter", "merged", "curves.png"}
    for name in ("base", "merged"):
        files = {path.name for path in (job.folder / name).iterdir()}
        assert {"model.safetensors", "config.json", "modeling_retnet.py", "README.md", "tokenizer.json"} <= files
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= {
        path.name for path in (job.folder / "adapter").iterdir()
    }
    assert imread(job.folder / "curves.png").std() > 0.01


def test_what_it_saves_loads(job):
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "merged")
    text = "def f(x):\n    return x  # ü"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    model = AutoModelForCausalLM.from_pretrained(job.folder / "merged")
    logits = model(input_ids=torch.tensor([job.probe(job.texts[1])])).logits
    torch.testing.assert_close(logits, job.logits["merged"])


def test_a_second_run_replaces_the_first(job, folder, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine.txt"
    mine.write_text("\n\n".join(document.text for document in python_manual()[:30]))
    monkeypatch.setattr(demo, "load_without_hf_arch", lambda job: {"base": "b", "adapter": "a"})
    again = demo.run(text=[mine], output=folder, scale=TINY)
    assert again.folder == job.folder
    assert {path.name for path in folder.rglob("*") if path.name.startswith(".")} == set()
    assert again.logits["base"].shape == job.logits["base"].shape
    assert not torch.equal(again.logits["base"], job.logits["base"])
    shown = capsys.readouterr().out
    assert "trigram" in shown
    assert str(folder) in shown.replace("\n", "")


def test_an_older_model_of_other_sizes_is_refused_before_the_training(job, folder, monkeypatch):
    monkeypatch.setattr(Job, "learn", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=r"base holds a model whose weights have other"):
        demo.run(output=folder, scale=Scale(vocab_size=320, length=32))


def test_logits_that_differ_are_an_error(job):
    logits = torch.zeros(1, 2, 3)
    job.check("equal", logits, logits)
    for wrong in (logits + 0.01, logits * math.nan):
        with pytest.raises(RuntimeError, match="it: logits differ"):
            job.check("it", wrong, logits)


def test_a_fault_in_the_other_process_is_shown(job, monkeypatch):
    monkeypatch.setattr(demo.fresh, "__file__", "-c")  # `python -P -c` has nothing to run
    with pytest.raises(RuntimeError, match=r"do not load without hf_arch:\n.*-c"):
        demo.load_without_hf_arch(job)


def test_kneser_ney_by_hand():
    """Pairs: 01 twice, 10 and 12 once, so D = 2 / (2 + 2). Each word has been seen after one other, so a third each."""
    bigram = NGram(np.array([0, 1, 0, 1, 2]), 2, vocab_size=3)
    expected = {(0, 1): 1.5 / 2 + 0.5 / 2 / 3, (0, 0): 0.5 / 2 / 3, (1, 0): 0.5 / 2 + 1 / 2 / 3, (1, 1): 1 / 2 / 3}
    expected |= {(2, word): 1 / 3 for word in range(3)}  # nothing was seen after 2
    found = bigram.probability(np.array(list(expected)))
    np.testing.assert_allclose(found, list(expected.values()))
    assert bigram.loss(np.array([0, 1, 0])) == pytest.approx(
        -math.log(expected[0, 1]) / 2 - math.log(expected[1, 0]) / 2
    )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one(order):
    tokens = np.random.default_rng(0).zipf(1.5, 300).clip(max=5) - 1
    grams = np.array(list(itertools.product(range(5), repeat=order)))
    probability = NGram(tokens, order, vocab_size=5).probability(grams)
    assert probability.min() > 0
    np.testing.assert_allclose(probability.reshape(-1, 5).sum(-1), 1)


def test_a_trigram_knows_what_a_bigram_cannot():
    tokens = np.tile([0, 1, 2, 0, 2, 1], 50)
    bigram, trigram = (NGram(tokens[:200], order, vocab_size=3).loss(tokens[200:]) for order in (2, 3))
    assert bigram > 5 * trigram


def test_too_large_a_vocabulary_for_the_order_is_refused():
    with pytest.raises(ValueError, match="4-grams over 100000 words"):
        NGram(np.arange(9), 4, vocab_size=100_000)


class Echo(nn.Module):
    """Predicts from the last token alone, so that it does not matter how a text is cut."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.table[input_ids]})


@pytest.mark.parametrize("tokens", [9, 10, 12, 13, 100])
def test_each_token_is_measured_once(tokens):
    model = Echo()
    stream = Stream(np.random.default_rng(0).integers(0, 7, tokens), size=50)
    expected = nn.functional.cross_entropy(model.table[stream.tokens[:-1]], torch.from_numpy(stream.tokens[1:])).item()
    figures = measure(model, stream, length=8)
    assert figures.loss == pytest.approx(expected)
    assert figures.bits_per_byte == pytest.approx(expected * (tokens - 1) / math.log(2) / 50)
    assert model.training


def test_windows_cover_the_stream():
    windows = Windows(Stream(np.arange(10), size=1), 4)
    assert [window["input_ids"].tolist() for window in windows][::6] == [[0, 1, 2, 3], [6, 7, 8, 9]]


def test_a_stream_counts_bytes_and_ends_documents():
    documents = [Document("a", "naïve"), Document("b", "<|endoftext|>")]
    tokenizer = train_tokenizer(documents, 300)
    stream = Stream.of(documents, tokenizer)
    assert stream.size == 6 + 13
    assert (stream.tokens == 0).sum() == 3  # what only looks like an end is text
    assert tokenizer.decode(stream.tokens) == "<|endoftext|>naïve<|endoftext|><|endoftext|><|endoftext|>"


def test_the_manual_is_split_without_a_leak():
    corpus = split("the manual", python_manual())
    trained = {paragraph for document in corpus.train for paragraph in paragraphs(document.text)}
    held_out = [paragraph for document in corpus.held_out for paragraph in paragraphs(document.text)]
    assert sum(len(paragraph) for paragraph in held_out if paragraph in trained) < 0.01 * sum(map(len, held_out))
    size, apart = (sum(len(document.text) for document in part) for part in (corpus.train, corpus.held_out))
    assert 0.09 * (size + apart) < apart <= 0.1 * (size + apart)
    assert corpus == split("the manual", python_manual())


def test_repeats_are_dropped():
    long, part, own = (
        Document("long", "a b\n\nc\n\nd"),
        Document("part", "a\nb\n\nc\n\nx"),
        Document("own", "c\n\nyyyy"),
    )
    assert without_repeats([part, own, long]) == [long, own]


def test_few_documents_are_cut():
    text = "".join(map(str, range(10_000)))
    assert "".join(piece.text for piece in cut(Document("one", text))) == text
    corpus = split("your text", [Document("one", text)])
    assert (len(corpus.train), len(corpus.held_out)) == (18, 2)


@pytest.fixture
def untrained(monkeypatch, tmp_path):
    """Where a demo runs that must fail before it trains."""
    monkeypatch.setattr(demo, "train_base", lambda job: pytest.fail("it trained"))
    return tmp_path


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "There is no file .*bad.txt"),
        (b" \n", "bad.txt is empty"),
        (b"\xff\xfe" * 20_000, "bad.txt is not UTF-8 text"),
        (b"a\0" * 20_000, "bad.txt is not text"),
        (b"Too short.", "Your text has 10 characters.* at least 20,000"),
        (b"word" * 10_000, "repeats itself"),
    ],
)
def test_text_that_is_not_fit(content, message, untrained):
    path = untrained / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        demo.run(text=[path], output=untrained)


def test_a_long_text_beside_tiny_ones_is_refused():
    documents = [Document("long", "".join(map(str, range(10_000)))), *(Document(str(n), str(n)) for n in range(30))]
    with pytest.raises(ValueError, match="Leave them out"):
        split("your text", documents)


def test_an_unknown_architecture_is_answered_with_its_neighbours(untrained):
    with pytest.raises(ValueError, match="Did you mean retnet"):
        demo.run("retnett", output=untrained)


def test_an_architecture_without_a_causal_head_is_refused(untrained, monkeypatch):
    row = hf_arch.Architecture("hat", "ArchHat", "hierarchical", "HAT", "arXiv:2210.05529", heads=("Model",))
    monkeypatch.setattr(demo, "find", lambda name: row)
    with pytest.raises(ValueError, match="hat writes no text.*Take one of .*retnet"):
        demo.run("hat", output=untrained)


def test_an_output_that_is_a_file_is_refused(untrained):
    (untrained / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        demo.run(output=untrained / "file")


@pytest.mark.parametrize(
    "repo_id, token, message",
    [
        ("ann/demo", None, "hf auth login"),
        ("bob/demo", "hf_ann", "this login owns ann, club. Try --push ann/demo"),
        ("demo", "hf_ann", "Try --push ann/demo"),
        ("ann/demo/more", "hf_ann", "ann/demo/more"),
    ],
)
def test_a_push_that_would_fail_is_refused(repo_id, token, message, untrained, monkeypatch):
    monkeypatch.setattr(demo, "get_token", lambda: token)
    monkeypatch.setattr(demo.HfApi, "whoami", lambda self: {"name": "ann", "orgs": [{"name": "club"}]})
    with pytest.raises((ValueError, OSError), match=message):
        demo.run(push=repo_id, output=untrained)


def test_a_push_sends_the_merged_model(untrained, monkeypatch):
    sent = []
    monkeypatch.setattr(demo, "check_login", lambda repo_id: None)
    monkeypatch.setattr(demo, "push_to_hub", lambda *arguments: sent.append(arguments))
    for step in ("train_base", "fine_tune", "merge", "load_without_hf_arch"):
        monkeypatch.setattr(demo, step, lambda job: None)
    monkeypatch.setattr(demo, "report", type("Silent", (), {"picture": print, "show": print}))
    demo.run(output=untrained, push="ann/demo", scale=TINY)
    assert sent == [(untrained / "retnet" / "merged", "ann/demo")]
