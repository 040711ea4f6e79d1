"""The recipe for lm-eval, offline, against probabilities that are computed directly; where the extra `evaluate` is
installed."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_arch import find
from hf_arch.demo.text import Document
from hf_arch.demo.tokens import train_tokenizer

pytest.importorskip("lm_eval", reason="the extra `evaluate` is not installed")
from examples.lm_eval_recipe import DOCUMENTS, evaluate  # noqa: E402


@pytest.fixture
def tokenizer():
    return train_tokenizer([Document("", " ".join(document["question"] for document in DOCUMENTS))], 280)


def log_probability(model, tokens: list[int], asked: int) -> float:
    """Of the last `asked` tokens."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[-asked:].sum().item()


@torch.no_grad()
def test_its_figures_are_those_of_a_direct_computation(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = find("retnet")
    torch.manual_seed(1)
    config = row.tiny_config("ForCausalLM", vocab_size=280, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    row.load("ForCausalLM")(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    found = evaluate(str(tmp_path))
    bits, right = 0.0, 0
    for document in DOCUMENTS:
        ids = tokenizer(document["question"])["input_ids"]
        bits -= log_probability(model, [0, *ids], len(ids)) / math.log(2)
        choices = [tokenizer(f" {choice}")["input_ids"] for choice in document["choices"]]
        scores = [log_probability(model, ids + choice, len(choice)) for choice in choices]
        right += scores[document["answer"]] == max(scores)
    size = sum(len(document["question"].encode()) for document in DOCUMENTS)
    assert found["local_text"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-4)
    assert found["local_choice"]["acc,none"] == right / len(DOCUMENTS)
