"""Distillation: the loss is the one of the paper, students of any kind come near to their teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model
from torch.testing import assert_close

import hf_arch
from hf_arch.compress import DistillationTrainer, prune
from hf_arch.compress.distillation import soft_loss
from hf_arch.modeling.skeleton import heads
from promises import Case, some_tokens

DECODER = Case(hf_arch.find("transformer"), "ForCausalLM")


def windows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    ids = some_tokens(count, 24)
    labels = ids.clone()
    labels[:, 17:] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def trainer_of(student, teacher, folder, max_steps: int = 1, **options):
    plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 4, "max_steps": max_steps, "learning_rate": 3e-3}
    arguments = transformers.TrainingArguments(str(folder), **plain, **sizes)
    return DistillationTrainer(student, arguments, teacher=teacher, train_dataset=windows(), **options)


def batch_of(data) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in data]) for name in data[0]}


def test_the_loss_is_that_of_the_paper(tmp_path):
    teacher, student = DECODER.build(torch.float32), DECODER.build(torch.float32, initializer_range=0.1).train()
    trainer = trainer_of(student, teacher, tmp_path, temperature=3.0, alpha=0.3, hidden_weight=0.7)
    batch = batch_of(windows())
    loss = trainer.compute_loss(student, dict(batch))
    ours, theirs = (model(batch["input_ids"], output_hidden_states=True) for model in (student, teacher))
    total = soft = hidden = 0.0
    for row in range(8):
        for place in range(16):  # which names the next token; from there on nothing is asked
            p = (theirs.logits[row, place] / 3).softmax(-1)
            q = (ours.logits[row, place] / 3).softmax(-1)
            soft += 9 * (p * (p / q).log()).sum()
            total -= ours.logits[row, place].log_softmax(-1)[batch["labels"][row, place + 1]]
            a, b = (F.normalize(each.hidden_states[-1][row, place], dim=0) for each in (ours, theirs))
            hidden += (a - b).square().sum()
    assert_close(loss, (0.7 * total + 0.3 * soft + 0.7 * hidden) / 128, rtol=1e-4, atol=1e-5)
    assert_close(trainer.compute_loss(student, dict(batch), num_items_in_batch=torch.tensor(256)), loss / 2)
    assert_close(trainer.compute_loss(student.eval(), dict(batch)), total / 128, rtol=1e-4, atol=1e-5)
    logits = torch.randn(5, 9)
    assert soft_loss(logits, logits + 3.0, 2.0).abs() < 1e-5
    assert not any(weight.requires_grad for weight in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize("kind", ["pruned", "other", "adapters", "seq2seq", "foreign"])
def test_students_come_nearer_to_their_teacher(kind, tmp_path):
    case = Case(hf_arch.find("encoder_decoder"), "ForConditionalGeneration") if kind == "seq2seq" else DECODER
    teacher, data = case.build(torch.float32, initializer_range=0.1), windows()
    student = (
        prune(teacher, channels=0.5)
        if kind != "other"
        else Case(hf_arch.find("retnet"), "ForCausalLM").build(torch.float32, initializer_range=0.1)
    )
    if kind == "foreign":
        sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        teacher = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=32))
    if kind == "adapters":
        student = get_peft_model(student, hf_arch.lora_config(student, r=4))
    kept = copy.deepcopy(teacher.state_dict())

    def distance() -> float:
        batch = batch_of(data)
        with torch.no_grad():
            ours, theirs = student.eval()(**batch).logits, teacher.eval()(**batch).logits
        return soft_loss(ours.flatten(0, 1), theirs.flatten(0, 1), 1.0).item()

    before = distance()
    trainer = trainer_of(student, teacher, tmp_path, 16, alpha=1.0)
    trainer.train()
    assert distance() < 0.95 * before
    assert_close(dict(teacher.state_dict()), dict(kept), atol=0, rtol=0)
    if kind == "pruned":
        trainer.save_model(tmp_path / "student")
        again = type(student).from_pretrained(tmp_path / "student")
        assert again.config.intermediate_size == student.config.intermediate_size


def test_a_large_batch_keeps_its_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 10)
    student = DECODER.build(torch.float32).train()
    batch = batch_of(windows())
    assert student(**batch).logits is None and student(**batch, return_logits=True).logits is not None
    trainer = trainer_of(student, copy.deepcopy(student), tmp_path)
    assert trainer.compute_loss(student.train(), batch).isfinite()


@pytest.mark.parametrize(
    "teacher, options, message",
    [
        ({"vocab_size": 80}, {}, "The teacher names 80 tokens and the student 96"),
        ({"hidden_size": 64}, {"hidden_weight": 1.0}, "Hidden states of 64 and 32 numbers"),
        ({}, {"temperature": 0.0}, "temperature 0.0 must be positive"),
        ({}, {"alpha": 1.5}, "alpha 1.5"),
    ],
    ids=str,
)
def test_what_cannot_teach_is_explained(teacher, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(DECODER.build(torch.float32), DECODER.build(torch.float32, **teacher), tmp_path, **options)


def test_a_batch_without_labels_is_explained(tmp_path):
    student = DECODER.build(torch.float32).train()
    with pytest.raises(ValueError, match="has no labels"):
        trainer_of(student, copy.deepcopy(student), tmp_path).compute_loss(student, {"input_ids": some_tokens()})
