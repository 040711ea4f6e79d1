"""docs/tools.md: the snippets of tools that have no tests of their own, and that none is left out."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

import tools_page
from hf_arch import embed

RUN_HERE = ("sentence-transformers", "lm-eval", "torch.compile and CUDA graphs")
RUN_BESIDE_THEIR_TESTS = ("Serving", "trl")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_all_snippets_are_run():
    with_python = [name for name, text in tools_page.SECTIONS.items() if "```python" in text]
    assert sorted(with_python) == sorted(RUN_HERE + RUN_BESIDE_THEIR_TESTS)


def test_a_decoder_speaks_by_its_last_token():
    names = tools_page.run("sentence-transformers")
    tokenizer, model = AutoTokenizer.from_pretrained("reader"), AutoModel.from_pretrained("reader").eval()
    inputs = tokenizer(["a short text", "another, which is longer"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = embed(model, dict(inputs), "last")
    assert_close(torch.nn.functional.normalize(torch.tensor(names["vectors"])), expected, atol=1e-5, rtol=1e-4)
    names["searcher"].save("searcher")
    again = type(names["searcher"])("searcher").encode(["a short text"])
    assert_close(torch.tensor(again[0]), torch.tensor(names["vectors"][0]), atol=1e-5, rtol=1e-4)


def test_lm_eval_takes_a_model():
    assert tools_page.run("lm-eval")["model"].max_length == 256


def test_compiled():
    torch._dynamo.reset()
    names = tools_page.run("torch.compile and CUDA graphs")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert_close(names["logits"], names["model"](tokens, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(names["said"], names["model"].generate(tokens, max_new_tokens=8, do_sample=False))
