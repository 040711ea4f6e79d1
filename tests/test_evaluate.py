"""`hf-arch evaluate`: its numbers against a direct computation, its files, and what it refuses."""

import json
import math

import pytest
import torch
from matplotlib.image import imread
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from hf_arch import cli, find
from hf_arch.demo.text import Document, python_manual
from hf_arch.demo.tokens import train_tokenizer
from hf_arch.evaluate import run as evaluation
from hf_arch.evaluate.bits import Tokens, measure, window_ends
from hf_arch.evaluate.loading import learned_positions
from hf_arch.evaluate.passkey import FILLER, Prompts, look_for_keys
from hf_arch.evaluate.reading import Reader
from promises import DECODERS, some_tokens

TEXT = "".join(document.text for document in python_manual()[:3])[:6000] + "naïve"
SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("text", TEXT)], 300)


def saved(row: str, folder, tokenizer=None, head: str = "ForCausalLM", **fields) -> str:
    torch.manual_seed(0)
    shape = SIZES | {"num_attention_heads": 2, "max_position_embeddings": 128}
    find(row).load(head)(find(row).load("Config")(**(shape | fields))).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text(TEXT)
    return str(path)


def direct(model, tokens: torch.Tensor) -> torch.Tensor:
    """-log p of each token but the first, in one pass."""
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("case", [case for case in DECODERS if "prefix" not in str(case) and not case.answers], ids=str)
def test_pieces_are_read_as_a_whole(case):
    """Every causal row, and the laboratory's choices: lengths at, before and after the edges of pieces."""
    model = case.build(torch.float32)
    reader, tokens = Reader(model, piece=16), some_tokens()
    reader.check(tokens[:1])
    assert reader.in_pieces
    for length in (2, 16, 17, 18, 33, 70):
        found = reader.read(tokens[:, :length])
        torch.testing.assert_close(found.nats, direct(model, tokens[:, :length]), atol=1e-3, rtol=1e-3)
        last = reader.read(tokens[:, :length], last=min(5, length - 1))
        torch.testing.assert_close(last.nats, found.nats[:, -5:], atol=1e-3, rtol=1e-3)
        assert torch.equal(last.right, found.right[:, -5:])


def test_what_is_right_is_the_most_probable():
    model = DECODERS[0].build(torch.float32)
    tokens = some_tokens(batch=6, length=12)
    tokens[:3, -1] = model(input_ids=tokens[:3, :-1]).logits[:, -1].argmax(-1)
    right = Reader(model).read(tokens, last=1).right[:, 0]
    assert (
        right.tolist()
        == [True] * 3 + (model(input_ids=tokens[3:, :-1]).logits[:, -1].argmax(-1) == tokens[3:, -1]).tolist()
    )


def others() -> dict:
    """Models of transformers' own: one that reads on from its cache, one whose cache is called otherwise."""
    llama = LlamaConfig(**SIZES, num_attention_heads=2)
    mamba = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)
    return {"llama": LlamaForCausalLM(llama), "mamba": MambaForCausalLM(mamba)}


@pytest.mark.parametrize("name, in_pieces", [("llama", True), ("mamba", False)])
def test_a_cache_that_cannot_be_told_pieces_is_not(name, in_pieces):
    model, tokens = others()[name].eval(), some_tokens()
    reader = Reader(model, piece=16)
    reader.check(tokens[:1])
    assert reader.in_pieces is in_pieces
    torch.testing.assert_close(reader.read(tokens).nats, direct(model, tokens), atol=1e-4, rtol=1e-4)


def test_a_cache_that_forgets_is_noticed(monkeypatch):
    model = DECODERS[0].build(torch.float32)
    forward = model.forward
    reader = Reader(model)
    monkeypatch.setattr(model, "forward", lambda past_key_values=None, **told: forward(**told))
    reader.check(some_tokens())
    assert not reader.in_pieces


def test_a_model_that_sees_the_future_is_refused():
    config = find("transformer").tiny_config("ForMaskedLM", initializer_range=0.2)
    with pytest.raises(ValueError, match="sees the future"):
        Reader(find("transformer").load("ForMaskedLM")(config)).check(some_tokens())


def test_bits_are_those_of_a_direct_computation():
    model = DECODERS[0].build(torch.float32)
    ids = some_tokens(batch=1, length=210)[0]
    text = Tokens(ids, size=500, prefix=(5,))
    positions, contexts = measure(Reader(model, piece=16), text, (32, 96), windows=2)
    to_bits = len(ids) / 500 / math.log(2)
    ends = [96, 210]
    windows = torch.stack([torch.cat((torch.tensor([5]), ids[end - 95 : end])) for end in ends])
    whole = direct(model, windows) * to_bits
    short = direct(model, torch.stack([torch.cat((torch.tensor([5]), ids[end - 31 : end])) for end in ends])) * to_bits
    assert [at.length for at in contexts] == [32, 96]
    for at, bits in zip(contexts, (short[:, -16:], whole[:, -16:]), strict=True):
        assert at.bits_per_byte == pytest.approx(bits.mean().item(), rel=1e-4)
        assert at.error == pytest.approx((bits.mean(1).std() / 2**0.5).item(), rel=1e-3)
    assert [(at.first, at.last) for at in positions] == [(1, 15), (16, 31), (32, 63), (64, 95)]
    for at in positions:
        assert at.bits_per_byte == pytest.approx(whole[:, at.first - 1 : at.last].mean().item(), rel=1e-4)


def test_windows_do_not_overlap():
    assert window_ends(100, 30, most=8) == [30, 65, 100]
    assert window_ends(100, 60, most=8) == [60]
    assert window_ends(30, 30, most=8) == [30]
    with pytest.raises(ValueError, match="29 tokens, too few for a length of 30"):
        window_ends(29, 30, most=8)


def test_prompts_are_as_long_as_they_should_be(tokenizer):
    prompts = Prompts(tokenizer, prefix=(0,))
    for depth, before in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        ids, asked = prompts.make(700, depth, 12345)
        told = tokenizer.decode(ids[:-asked])
        assert len(ids) == 700 and ids[0] == 0
        assert tokenizer.decode(ids[-asked:]) == " 12345" and told.endswith("The pass key is")
        start, rest = told.split(" The pass key is 12345. Remember it. 12345 is the pass key.")
        filler = start.count("grass") + rest.count("grass")
        assert filler > 3 and start.count("grass") / filler == pytest.approx(before, abs=0.2)
    assert prompts.fits(700) and not prompts.fits(40)
    with pytest.raises(ValueError, match="does not fit into 40 tokens: it takes"):
        prompts.make(40, 0.5, 12345)
    assert FILLER.startswith(" ")


class Finder:
    """Reads like a model that finds keys in the first half of a text, and half of a key's tokens elsewhere."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def read(self, tokens, last):
        told = self.tokenizer.decode(tokens[0].tolist())
        near = told.index("Remember it") < len(told) / 2
        right = torch.ones(1, last, dtype=torch.bool)
        right[:, last // 2 :] = near
        return type("Reading", (), {"right": right})


def test_cells_count_what_was_found(tokenizer):
    cells = list(look_for_keys(Finder(tokenizer), Prompts(tokenizer), (40, 700), (0.0, 1.0), trials=3))
    assert [(cell.length, cell.depth, cell.retrieved) for cell in cells] == [(700, 0.0, 1.0), (700, 1.0, 0.0)]
    assert cells[0].tokens_right == 1.0 and 0.2 < cells[1].tokens_right < 0.8
    assert not list(look_for_keys(Finder(tokenizer), Prompts(tokenizer), (700,), (0.0,), trials=0))


@pytest.mark.parametrize("row", ["retnet", "transformer"])
def test_the_command_writes_what_it_found(row, tokenizer, text_file, tmp_path, capsys):
    model, output = saved(row, tmp_path / "model", tokenizer), tmp_path / "found"
    told = ["--lengths", "400", "64", "--windows", "3", "--trials", "1", "--output", str(output)]
    assert cli.main(["evaluate", model, "--text", text_file, *told]) == 0
    found = json.loads((output / "evaluation.json").read_text())
    assert [at["length"] for at in found["by_context"]] == [64, 400]
    assert {(cell["length"], cell["depth"]) for cell in found["passkey"]} == {(400, depth / 4) for depth in range(5)}
    assert found["read_in_pieces"] and found["text"]["bytes"] == len(TEXT.encode())
    bits = found["by_context"][1]["bits_per_byte"]
    assert bits == pytest.approx(math.log2(300) * found["text"]["tokens"] / found["text"]["bytes"], rel=0.02)
    assert f"{bits:.3f}" in capsys.readouterr().out
    assert f"| 400 | {bits:.3f} ±" in (output / "evaluation.md").read_text()
    assert imread(output / "evaluation.png").std() > 0.01
    assert {path.name for path in output.iterdir()} == {"evaluation.json", "evaluation.md", "evaluation.png"}


def test_lengths_are_chosen_by_the_trained_one(tokenizer, text_file, tmp_path):
    settings = evaluation.Settings(windows=1, trials=0)
    report = evaluation.run(saved("retnet", tmp_path / "model", tokenizer), [text_file], tmp_path / "out", settings)
    assert report.settings["lengths"] == [32, 64, 128, 256, 512]
    assert not report.passkey and "No pass key fits" in (tmp_path / "out" / "evaluation.md").read_text()


@pytest.mark.parametrize("table", ["ours", "gpt2"])
def test_learned_positions_end_where_they_end(table, tokenizer, text_file, tmp_path, capsys):
    folder = tmp_path / "model"
    if table == "ours":
        saved("transformer", folder, tokenizer, position_type="learned")
    else:
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=128)).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
    told = ["evaluate", str(folder), "--text", text_file, "--output", str(tmp_path / "out")]
    assert cli.main([*told, "--lengths", "64", "256"]) == 2
    assert "has learned 128 positions and has none for a length of 256" in capsys.readouterr().err
    assert cli.main([*told, "--windows", "1", "--trials", "0"]) == 0
    assert [at["length"] for at in json.loads((tmp_path / "out" / "evaluation.json").read_text())["by_context"]] == [
        32,
        64,
        128,
    ]


def test_positions_that_are_computed_have_no_end():
    for kind in ("rope", "xpos", "alibi", "t5", "none", "sinusoidal"):
        assert (
            learned_positions(
                find("transformer").load("ForCausalLM")(find("transformer").tiny_config(position_type=kind))
            )
            is None
        )


@pytest.mark.parametrize(
    "fault, told, message",
    [
        ({"tokenizer": False}, [], "model holds no tokenizer"),
        ({"head": "ForSequenceClassification"}, [], "is no causal language model: it has no weights for lm_head"),
        ({"vocab_size": 100}, [], "it belongs to another model"),
        ({}, ["--lengths", "64", "9000"], "too few for a length of 9,000"),
        ({}, ["--lengths", "8"], "32 or more"),
        ({}, ["--windows", "0"], "--windows and --piece are 1 or more"),
        ({}, ["--dtype", "int8"], "is no floating-point type"),
        ({}, ["--device", "cuda"], "no GPU"),
        ({}, ["--tokenizer", "{folder}"], "holds no tokenizer"),
        ({}, ["--text", "{folder}/absent.txt"], "There is no file"),
    ],
)
def test_what_cannot_work_is_said_at_once(fault, told, message, tokenizer, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fault = dict(fault)
    names = tokenizer if fault.pop("tokenizer", True) else None
    model = saved("retnet", tmp_path / "model", names, **fault)
    told = [word.format(folder=tmp_path) for word in told]
    assert cli.main(["evaluate", model, "--text", text_file, "--output", str(tmp_path / "out"), *told]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_said_so(tokenizer, text_file, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "names")
    assert cli.main(["evaluate", str(tmp_path / "names"), "--text", text_file]) == 2
    assert "names holds no model: there is no config.json" in capsys.readouterr().err


def test_a_masked_model_is_no_causal_one(tokenizer, text_file, tmp_path, capsys):
    model = saved("transformer", tmp_path / "model", tokenizer, head="ForMaskedLM", direction="bidirectional")
    assert cli.main(["evaluate", model, "--text", text_file]) == 2
    assert "causal" in capsys.readouterr().err
