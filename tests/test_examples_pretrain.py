"""The recipe in small: each objective, one row of each family; noise, streams, precision, resuming, two processes."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_arch
from examples import pretrain
from hf_arch.demo.text import python_manual
from hf_arch.objectives import OBJECTIVES

SIZES = ["--length", "32", "--hidden-size", "32", "--layers", "2", "--vocab-size", "400", "--max_steps", "4"]
RUNS = [
    ("transformer", "causal"),
    ("transformer", "prefix"),
    ("rwkv7", "causal"),
    ("longformer", "masked"),
    ("switch", "span"),
    ("encoder_decoder", "prefix"),
    ("hat", "hierarchical"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "manual.jsonl"
    path.write_text("\n".join(json.dumps({"text": document.text[:3000]}) for document in python_manual()[:12]))
    return str(path)


@pytest.fixture
def run(text, tmp_path):
    def run(*more, output=tmp_path / "output"):
        return pretrain.main(["--text", text, "--output", str(output), *SIZES, *map(str, more)])

    return run


@pytest.mark.parametrize("architecture, objective", RUNS)
def test_every_objective(run, architecture, objective, capsys, tmp_path):
    """With noise, which trains a second model."""
    found = run("--architecture", architecture, "--objective", objective, "--augment", 0.2, "--save_strategy", "no")
    plain, noisy = found[architecture], found[f"{architecture}, noise 20%"]
    assert found["trigram"] < found["bigram"] < 6 and 3 < plain < 7 and 3 < noisy < 7 and plain != noisy
    told = capsys.readouterr().out
    assert f"{architecture}, noise 20%" in told and ("bits / byte" in told) == (objective == "causal")
    if (architecture, objective) == RUNS[0]:
        folder = tmp_path / "output" / "plain" / "model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    "options",
    [["--objective", "masked", "--architecture", "s4"], ["--stream", "--augment", "0.2"]],
    ids=["hidden tokens", "a stream with noise"],
)
def test_a_run_that_ended_early_ends_alike(run, options, tmp_path):
    whole = run("--save_steps", 2, "--precision", "bf16", "--activation_checkpointing", *options)
    ended = tmp_path / "ended"
    for folder in (tmp_path / "output").glob("*/checkpoint-2"):
        shutil.copytree(folder, ended / folder.parent.name / folder.name)
    shutil.copytree(tmp_path / "output" / "tokenizer", ended / "tokenizer")
    with pytest.raises(ValueError, match="holds an earlier run: --resume goes on"):
        run(*options, output=ended)
    again = run(
        "--save_steps", 2, "--precision", "bf16", "--activation_checkpointing", "--resume", *options, output=ended
    )
    assert again == whole
    files = sorted((tmp_path / "output").glob("*/model/model.safetensors"))
    assert len(files) == 1 + ("--augment" in options)
    for file in files:
        found = load_file(ended / file.relative_to(tmp_path / "output"))
        assert_close(found, load_file(file), atol=0, rtol=0)


def test_it_learns_bytes_from_word_vectors(run, tmp_path, capsys):
    """Of single letters here."""
    vectors = tmp_path / "vectors.txt"
    vectors.write_text(
        "".join(f"{letter} {' '.join(str(ord(letter) * n % 7) for n in range(32))}\n" for letter in "aeiou")
    )
    found = run(
        "--tokenizer",
        "bytes",
        "--word-vectors",
        vectors,
        "--max_steps",
        25,
        "--warmup_steps",
        0,
        "--save_strategy",
        "no",
    )
    assert found["retnet"] < 5 and "5 are words of the file" in capsys.readouterr().out


def test_what_cannot_be_is_said_at_once(run, monkeypatch):
    with pytest.raises(ValueError, match="retnet has no head for the objective span, but for causal; encoder_decoder,"):
        run("--objective", "span")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run("--precision", "fp16")
    with pytest.raises(ValueError, match="splits matrices on GPUs alone"):
        run("--tensor-parallel", 2)
    with pytest.raises(ValueError, match="too few documents"):
        run("--text", __file__)


def test_every_architecture_has_an_objective():
    learns = {
        row.name: [name for name, kind in OBJECTIVES.items() if kind.head_of(row)] for row in hf_arch.ARCHITECTURES
    }
    assert all(learns.values())
    assert learns["transformer"] == ["causal", "prefix", "masked"] and learns["retnet"] == ["causal"]
    assert learns["hat"] == ["masked", "hierarchical"] and learns["hat_encoder_decoder"] == ["prefix", "span"]
