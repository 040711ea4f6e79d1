"""The recipe for lm-eval, offline, against probabilities and answers that are computed directly."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import lm_eval_recipe
from examples.lm_eval_recipe import DOCUMENTS, evaluate
from hf_arch import find
from hf_arch.demo.text import Document
from hf_arch.demo.tokens import train_tokenizer


@pytest.fixture
def tokenizer():
    return train_tokenizer([Document("", " ".join(document["question"] for document in DOCUMENTS))], 280)


def log_probability(model, tokens: list[int], asked: int) -> float:
    """Of the last `asked` tokens."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[-asked:].sum().item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["retnet", "mixtral", "hnet"])
def test_its_figures_are_those_of_a_direct_computation(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = find(name)
    torch.manual_seed(1)
    config = row.tiny_config("ForCausalLM", vocab_size=280, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    row.load("ForCausalLM")(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    prompt = torch.tensor([tokenizer(DOCUMENTS[1]["question"])["input_ids"]])
    goes_on = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, prompt.shape[1] :]
    said = tokenizer.decode(goes_on, skip_special_tokens=True).partition(".")[0]
    documents = [DOCUMENTS[0], DOCUMENTS[1] | {"choices": ["cloud.", said]}]  # of two answers one is the model's own
    monkeypatch.setattr(lm_eval_recipe, "DOCUMENTS", documents)

    found = evaluate(str(tmp_path))
    bits, right = 0.0, 0
    for document in documents:
        ids = tokenizer(document["question"])["input_ids"]
        bits -= log_probability(model, [0, *ids], len(ids)) / math.log(2)
        choices = [tokenizer(f" {choice}")["input_ids"] for choice in document["choices"]]
        scores = [log_probability(model, ids + choice, len(choice)) for choice in choices]
        right += scores[document["answer"]] == max(scores)
    size = sum(len(document["question"].encode()) for document in documents)
    assert found["local_text"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-4)
    assert found["local_choice"]["acc,none"] == right / len(documents)
    assert found["local_answer"]["exact_match,none"] == 0.5
