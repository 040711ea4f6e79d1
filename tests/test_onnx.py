"""Programs without PyTorch: they answer as the model at other batches and lengths, or are not written."""

import onnxruntime
import pytest
import torch
from torch.testing import assert_close

import hf_arch
from benchmarks import programs
from benchmarks.experiments.record import load
from hf_arch.compress import deploy, to_onnx, to_program
from promises import Case, some_tokens

CAUSAL = {name: Case(hf_arch.find(name), "ForCausalLM") for name in ("transformer", "retnet")}
ONE = {"num_hidden_layers": 1}


@torch.no_grad()
def test_a_file_for_texts_of_any_length(tmp_path):
    model = CAUSAL["transformer"].build(torch.float32, **ONE)
    to_onnx(model, tmp_path / "new" / "model.onnx")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "new" / "model.onnx")
    for batch, length in ((1, 17), (5, 70)):
        tokens = some_tokens(batch, length)
        (found,) = session.run(None, {"input_ids": tokens.numpy()})
        assert_close(torch.from_numpy(found), model(tokens).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_encoder_is_told_of_padding():
    case = Case(hf_arch.find("encoder_decoder"), "ForConditionalGeneration")
    model = case.build(torch.float32, encoder_num_hidden_layers=1, **ONE)
    source, answer, real = some_tokens(2, 40), some_tokens(2, 55, seed=2), torch.ones(2, 40, dtype=torch.long)
    real[0, 31:] = 0
    found = to_program(model).module()(source, real, answer)
    for row, length in enumerate((31, 40)):
        alone = model(input_ids=source[row : row + 1, :length], decoder_input_ids=answer[row : row + 1]).logits
        assert_close(found[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_counts_in_chunks_has_a_length():
    model = CAUSAL["retnet"].build(torch.float32, **ONE).train()
    program = to_program(model, length=24)
    assert model.training
    tokens = some_tokens(2, 17)
    filled = torch.cat((tokens, some_tokens(2, 7, seed=3)), 1)  # with whatever
    assert_close(program.module()(filled)[:, :17], model.eval()(tokens).logits, atol=1e-4, rtol=1e-4)
    hat = Case(hf_arch.find("hat"), "ForMaskedLM").build(torch.float32)  # the soonest to be refused
    with pytest.raises(ValueError, match="texts of any number of tokens: sizes inside it depend.*Give a length"):
        to_program(hat)


def test_the_table_is_what_was_found():
    record = load(programs.NAME)
    assert programs.PAGE.read_text() == programs.page(record), "run: python -m benchmarks.programs"
    for name, told in record.items():
        assert set(told["heads"]) == set(programs.HEADS) & set(hf_arch.find(name).heads)


def test_the_table_is_made_row_by_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(programs, "attempt", lambda write: "This model is none: it is told here.")
    programs.main(["hnet", "--output", str(tmp_path)])
    assert set(load(programs.NAME, tmp_path)) == {"hnet"}
    assert "| hnet, decoder | - | - | it is told here |" in capsys.readouterr().out


def test_what_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    model = CAUSAL["transformer"].build(torch.float32, **ONE)
    monkeypatch.setattr(deploy, "NEAR", 0.0)
    with pytest.raises(ValueError, match="answers otherwise as a program"):
        to_onnx(model, tmp_path / "model.onnx", length=9)
    assert not list(tmp_path.iterdir())
