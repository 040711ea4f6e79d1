"""Texts as vectors: the loss and the Trainer."""

import pytest
import torch
import torch.nn.functional as F
from test_hat_processor import make, tokenizer  # noqa: F401
from torch.testing import assert_close
from transformers import TrainingArguments

from hf_arch import ContrastiveCollator, ContrastiveTrainer, contrastive_loss, embed, find
from promises import ENCODERS, EXACT, Case, some_tokens

LETTERS = list(zip("abcdefgh", "ijklmnop", "qrstuvwx", strict=True))
PAIRS = [{"query": f"{a} {a}", "positive": f"{b} {b} {b}"} for a, b, _ in LETTERS]
HARD = [pair | {"negative": f"{c} {c}"} for pair, (_, _, c) in zip(PAIRS, LETTERS, strict=True)]


def arguments(folder, **options):
    told = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no"}
    return TrainingArguments(str(folder), **told, remove_unused_columns=False, **options)


def test_the_loss_is_its_definition():
    queries, candidates = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    expected = 0.0
    for place, query in enumerate(queries):
        scores = torch.stack([query @ candidate for candidate in candidates]) / 0.1
        expected -= (scores[place].exp() / scores.exp().sum()).log() / 3
    assert_close(contrastive_loss(queries, candidates, 0.1), expected)


@torch.no_grad()
@pytest.mark.parametrize("pooling", [None, "mean", "first", "last"])
def test_padding_does_not_change_a_vector(pooling):
    case = next(case for case in ENCODERS if case.row.name == "longformer")
    model, tokens = Case(case.row, "Model").build(), some_tokens(1, 20)
    mask = torch.tensor([[0] * 3 + [1] * 20 + [0] * 2])
    padded = torch.full_like(mask, 5).masked_scatter(mask.bool(), tokens)
    alone = embed(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, pooling)
    assert_close(embed(model, {"input_ids": padded, "attention_mask": mask}, pooling), alone, **EXACT)
    states = model(tokens).last_hidden_state[0]
    expected = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling or "mean"]
    assert_close(alone[0], F.normalize(expected, dim=-1), **EXACT)
    with pytest.raises(ValueError, match="'best' is unknown; there are mean, first"):
        embed(model, {"input_ids": tokens, "attention_mask": mask}, "best")
    with pytest.raises(ValueError, match="without attention_mask"):
        embed(model, {"input_ids": tokens})


@pytest.mark.parametrize("name", ["hat", "s4", "transformer"])
def test_a_trainer_brings_pairs_together(name, make, tokenizer, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    row = find(name)
    fields = {"direction": "bidirectional"} if name == "transformer" else {}
    model = row.load("Model")(row.tiny_config("Model", **fields))
    reader = make() if name == "hat" else tokenizer
    collate = ContrastiveCollator(reader)
    assert ("query_segment_starts" in collate(PAIRS)) == (name == "hat")
    trainer = ContrastiveTrainer(
        model,
        arguments(tmp_path, max_steps=25),
        data_collator=collate,
        train_dataset=HARD,
        eval_dataset=PAIRS,
        recalls=(1, 3),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.3 * before["eval_loss"]
    assert after["eval_recall_at_1"] > max(0.8, before["eval_recall_at_1"]) and after["eval_recall_at_3"] == 1.0
    assert after["eval_recall_at_1"] <= after["eval_mrr"] <= 1.0


def test_what_the_trainer_cannot_do(tmp_path):
    model = find("hat").load("Model")(find("hat").tiny_config())
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        ContrastiveTrainer(model, TrainingArguments(str(tmp_path), report_to=[]))
    trainer = ContrastiveTrainer(model, arguments(tmp_path))
    tokens = some_tokens()
    with pytest.raises(ValueError, match="no positive_input_ids: take a ContrastiveCollator"):
        trainer.compute_loss(model, {"query_input_ids": tokens, "query_attention_mask": torch.ones_like(tokens)})
