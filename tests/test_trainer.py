"""Promise 8: transformers' Trainer trains, accumulates, packs, resumes, keeps the best, and saves adapters alone.

Rows are documents of several lengths in which a token is followed by its successor, mostly, so that there is something
to learn.
"""

import re

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_arch import lora_config
from promises import HEADS, MODELS, ROWS, Case, sums
from variants import IDLE

BATCH = 4
ONE_LARGE_BATCH = {"atol": 1e-5, "rtol": 1e-4}
# One head beside the causal one for each row, and all heads of the first row: rows share their code
OTHERS = [case for case in HEADS if case.head == "ForSequenceClassification"]
OTHERS += [
    case
    for case in HEADS
    if case.row is ROWS[0].row and case.head.endswith(("MaskedLM", "TokenClassification", "QuestionAnswering"))
]


def documents(head: str, count: int = 8) -> list[dict]:
    rows, draw = [], torch.Generator().manual_seed(0)
    for number in range(count):
        length = 12 if head == "ForQuestionAnswering" else 8 + 5 * (number % 4)  # its loss looks at padding too
        ids = torch.randint(3, 90, (1,), generator=draw) + torch.arange(length) % 6
        ids = torch.where(torch.rand(length, generator=draw) < 0.1, 91, ids)
        labels = {
            "ForSequenceClassification": {"labels": int(ids[0] > 45)},
            "ForQuestionAnswering": {"start_positions": number % 7, "end_positions": 7},
            "ForTokenClassification": {"labels": (ids % 2).tolist()},
        }
        rows.append({"input_ids": ids.tolist(), **labels.get(head, {"labels": ids.tolist()})})
    return rows


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Right padding, on which no loss rests."""
    longest = max(len(row["input_ids"]) for row in rows)
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    filler = {"input_ids": 5, "attention_mask": 0, "labels": -100}
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    for name, values in batch.items():
        if isinstance(values[0], list):
            batch[name] = [value + [filler[name]] * (longest - len(value)) for value in values]
    return {name: torch.tensor(values) for name, values in batch.items()}


def build(case: Case, seed: int = 0, **fields) -> torch.nn.Module:
    model = case.build(torch.float32, **fields)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter.copy_(torch.randn_like(parameter))
    return model


def make_trainer(folder, model, head: str = "ForCausalLM", collate=pad, **options) -> Trainer:
    defaults = {"max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": BATCH, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder), logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **defaults | options
    )
    rows = documents(head)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def curve(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_weights(model, folder) -> None:
    """Every tensor of the model is the one in the checkpoint folder, and none is missing there."""
    saved, state = load_file(folder / "model.safetensors"), model.state_dict()
    assert saved.keys() == state.keys() - model.all_tied_weights_keys.keys()
    assert_close({name: state[name] for name in saved}, saved, atol=0, rtol=0)


def test_trains_resumes_evaluates_and_keeps_the_best(model_case, tmp_path):
    """With dropout, so that resuming also restores the random state. The best is made to be the first, not the last."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(
        tmp_path / "whole",
        build(model_case, **dropout),
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        **saving,
    )
    whole.train()
    losses = curve(whole)
    assert len(losses) == 8 and sum(losses[-2:]) < 0.9 * sum(losses[:2])
    first, last = curve(whole, "eval_loss")
    assert last < first
    assert_weights(whole.model, tmp_path / "whole" / "checkpoint-4")
    assert whole.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-6)

    resumed = make_trainer(tmp_path / "resumed", build(model_case, seed=1, **dropout), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_weights(resumed.model, tmp_path / "whole" / "checkpoint-8")
    assert curve(resumed) == losses
    rows = documents(model_case.head)
    longest = max(len(row["input_ids"]) for row in rows)
    assert resumed.predict(rows).predictions.shape == (len(rows), longest, resumed.model.config.vocab_size)


def one_step(folder, case, **options) -> Trainer:
    """A step of plain descent, in which weights tell the size of the gradient."""
    trainer = make_trainer(folder, build(case), case.head, max_steps=1, optim="sgd", learning_rate=0.1, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", [*MODELS, *OTHERS], ids=lambda case: f"{case.row.name}-{case.head}")
def test_accumulated_pieces_and_packed_documents_are_one_large_batch(case, tmp_path):
    """The documents differ in length, so that a mean of means would show."""
    large = one_step(tmp_path, case, per_device_train_batch_size=8)
    others = [one_step(tmp_path, case, per_device_train_batch_size=2, gradient_accumulation_steps=4)]
    if case.head == "ForCausalLM":
        packed = DataCollatorWithFlattening()
        others.append(one_step(tmp_path, case, per_device_train_batch_size=8, collate=packed))
    before = build(case).state_dict()
    matrices = [name for name, weight in large.model.named_parameters() if weight.ndim > 1]
    idle = IDLE.get(case.row.name, {}).get(case.head, "")
    same = [name for name in matrices if torch.equal(large.model.state_dict()[name], before[name])]
    assert not [name for name in same if not re.fullmatch(idle, name)]
    for other in others:
        assert curve(other) == pytest.approx(curve(large), rel=1e-4)
        assert_close(other.model.state_dict(), large.model.state_dict(), **ONE_LARGE_BATCH)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: f"{case.row.name}-{case.head}")
def test_other_heads_train(case, tmp_path):
    trainer = make_trainer(tmp_path, build(case), case.head)
    trainer.train()
    losses = curve(trainer)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert trainer.evaluate()["eval_loss"] > 0


def test_trains_in_bfloat16_with_wide_states(model_case, tmp_path):
    plain = make_trainer(tmp_path, build(model_case), max_steps=2)
    mixed = make_trainer(tmp_path, build(model_case), max_steps=2, bf16=True)
    plain.train(), mixed.train()
    assert curve(mixed) != curve(plain) and curve(mixed) == pytest.approx(curve(plain), rel=0.03)
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}
    with torch.no_grad(), mixed.compute_loss_context_manager(), mixed.accelerator.autocast():
        told = {"use_cache": True} if mixed.model.can_generate() else {}
        outputs = mixed.model.eval()(pad(documents("ForCausalLM", 2))["input_ids"], **told)
    assert {state.dtype for state in (sums(outputs.past_key_values) if told else ())} <= {torch.float32}


def test_label_smoothing_smooths_the_next_token(row_case, tmp_path):
    trainer = make_trainer(tmp_path, build(row_case), label_smoothing_factor=0.2)
    batch = pad(documents("ForCausalLM", 3))
    if row_case.answers:  # whose collators give what the decoder reads
        batch["decoder_input_ids"] = trainer.model.prepare_decoder_input_ids_from_labels(batch["labels"])
    found = trainer.compute_loss(trainer.model, dict(batch))
    labels = batch.pop("labels")
    logits = trainer.model(**batch).logits
    if not row_case.answers:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.2)
    assert_close(found, expected)


def test_adapters_are_saved_alone_and_resume(model_case, tmp_path):
    def adapted() -> torch.nn.Module:
        model = build(model_case)
        dropout = {} if model.config.has_experts else {"lora_dropout": 0.1}  # PEFT has none for stacked experts
        return get_peft_model(model, lora_config(model, r=2, **dropout))

    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", adapted(), **saving)
    whole.train()
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and not {name for name in names if name.startswith("model")}
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert len(saved) == len(trained) > 0 and all("lora_" in name for name in saved)

    resumed = make_trainer(tmp_path / "resumed", adapted(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert curve(resumed) == curve(whole)
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), atol=0, rtol=0)
    untouched = build(model_case).state_dict()
    for name, value in whole.model.base_model.model.state_dict().items():
        if name.replace(".base_layer", "") in untouched:
            assert torch.equal(value, untouched[name.replace(".base_layer", "")]), name
