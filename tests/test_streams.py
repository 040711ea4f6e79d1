"""Training on streams: segments go on where the last batch ended, and so does the memory, through checkpoints too."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import hf_arch
from hf_arch.states import pack
from hf_arch.streams import Memory, Segments, StatefulTrainer, collate_segments
from promises import DECODERS, EXACT, ROWS, Case, some_tokens

LABORATORY = next(case.row for case in ROWS if case.row.name == "transformer")
WINDOW = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}
BOUNDED = [case for case in ROWS if "bounded state" not in case.row.exceptions]
BOUNDED += [Case(LABORATORY, "ForCausalLM", "window", WINDOW)]
BOUNDED += [case for case in DECODERS if case.variant == "sliding_alibi"]
LENGTHS = (37, 9, 80, 2, 21, 22, 50, 1, 30)  # ends inside, at and just past a segment
SEGMENT = 7


@pytest.fixture(params=BOUNDED, ids=str)
def bounded_case(request):
    return request.param


def texts() -> list[list[int]]:
    return [some_tokens(1, length, seed=number)[0].tolist() for number, length in enumerate(LENGTHS)]


def batches(documents, rows: int, length: int = SEGMENT) -> DataLoader:
    return DataLoader(Segments(documents, length, rows), batch_size=rows, collate_fn=collate_segments)


def test_every_token_follows_once_in_its_own_place():
    documents = texts()
    data = Segments([{"input_ids": document} for document in documents], SEGMENT, 3)
    found = []
    for row in range(3):
        place, text = None, []
        for index in range(row, len(data), 3):
            item = data[index]
            if item["position_ids"][0]:  # the segment goes on where the last one of the row ended
                assert (place, item["position_ids"][0]) == (item["input_ids"][0], len(text))
            else:
                text = []
            real = sum(item["attention_mask"])
            text = text + item["input_ids"][:real]
            place = item["labels"][-1]
            if place == -100 or index + 3 >= len(data) or not data[index + 3]["position_ids"][0]:
                last = item["labels"][real - 1]
                found += [text + [last]] if last != -100 else []
    assert sorted(found) == sorted(document for document in documents if len(document) > 1)
    assert len(data) == 3 * 14
    with pytest.raises(ValueError, match="nothing to learn"):
        Segments([[5], []], 4, 2)
    with pytest.raises(ValueError, match="at least 1"):
        Segments(documents, 0, 2)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_segments_with_a_memory_are_one_long_text(bounded_case, training):
    model = bounded_case.build().train(training)
    model.config.compression_loss_coef = 0.0  # the loss of what is named alone
    memory, documents, found = Memory(), texts(), []
    for batch in batches(documents, 3):
        told = memory.tell(batch, model)
        outputs = model(**told)
        memory.detach()
        losses = torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="none"
        )
        found += losses[batch["shift_labels"].flatten() != -100].tolist()
        mean = losses.sum() / (batch["shift_labels"] != -100).sum()
        assert_close(outputs.loss, mean.float())  # transformers' loss is float32
        assert memory.cache.get_seq_length() == memory.seen.shape[1] <= 80 + 2 * SEGMENT
    expected = []
    for document in documents:
        whole = torch.tensor(document)[None]
        if len(document) > 1:
            logits = model(whole[:, :-1]).logits[0]
            expected += torch.nn.functional.cross_entropy(logits, whole[0, 1:], reduction="none").tolist()
    assert_close(sorted(found), sorted(expected), **EXACT)


def make_trainer(folder, model, rows: int = 2, documents=None, **options) -> StatefulTrainer:
    defaults = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1}
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=3,
        **defaults | options,
    )
    documents = documents or texts()
    return StatefulTrainer(
        model,
        arguments,
        train_dataset=Segments(documents, SEGMENT, rows),
        eval_dataset=Segments([document[:22] for document in documents if len(document) > 21], SEGMENT, 3),
    )


def curve(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_a_resumed_run_is_the_run_that_was_not_interrupted(bounded_case, tmp_path):
    """With dropout, accumulation over two batches, and evaluation in between."""

    def build():
        return bounded_case.build(torch.float32, hidden_dropout=0.1, initializer_range=0.08)

    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    whole = make_trainer(tmp_path / "whole", build(), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", build(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert curve(resumed) == curve(whole) and len(curve(whole)) == 6
    assert curve(resumed, "eval_loss") == curve(whole, "eval_loss")
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), atol=0, rtol=0)

    (tmp_path / "whole" / "checkpoint-4" / "memory-0.safetensors").unlink()
    with pytest.raises(ValueError, match="take the checkpoint of a StatefulTrainer"):
        make_trainer(tmp_path / "other", build(), **options).train(str(tmp_path / "whole" / "checkpoint-4"))


def test_evaluation_is_that_of_whole_texts_and_leaves_the_training_memory_alone(bounded_case, tmp_path):
    model = bounded_case.build()
    trainer = make_trainer(tmp_path, model, max_steps=3, learning_rate=0.0)
    trainer.train()
    before, _ = pack(trainer.memories[True].cache)
    before = {name: tensor.clone() for name, tensor in before.items()}
    whole = torch.tensor([document[:22] for document in texts() if len(document) > 21])
    assert len(whole) == 5  # some streams of the evaluation are filled up
    with torch.no_grad():
        expected = model.eval()(whole[:3], labels=whole[:3]).loss
    rows = Segments(whole.tolist()[:3], SEGMENT, 3)
    for _ in range(2):
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (9, SEGMENT, 96)
    after, _ = pack(trainer.memories[True].cache)
    assert before and trainer.memories[True].cache.get_seq_length() == 3 * SEGMENT
    assert_close(after, before, atol=0, rtol=0)


def test_gradients_flow_within_a_segment_and_stop_at_its_start(bounded_case):
    model, memory = bounded_case.build().train(), Memory()
    first, second = list(batches([some_tokens(1, 15, seed=row)[0].tolist() for row in (0, 1)], 2))
    embeds = []

    def keep(module, args, output):
        output.retain_grad()
        embeds.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    for batch in (first, second):
        outputs = model(**memory.tell(batch, model))
        memory.detach()
    outputs.loss.backward()
    assert embeds[0].grad is None and embeds[1].grad[:, 0].abs().max() > 1e-6
    whole = torch.cat((first["input_ids"], second["input_ids"]), dim=1)
    labels = torch.cat((torch.full_like(whole[:, :7], -100), second["shift_labels"]), dim=1)
    model(whole, labels=labels, shift_labels=labels).loss.backward()
    assert_close(embeds[1].grad, embeds[2].grad[:, 7:], **EXACT)


def key_texts(count: int) -> list[list[int]]:
    """A key token, and it once more after a marker at the start of each later segment."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.randint(10, 18, (count,), generator=draw).tolist()
    return [[key, 3, 4, 5, 6, 3, 4] + [7, key, 4, 5, 6, 3, 4] * 3 + [7] for key in keys]


def test_a_memory_learns_what_lies_beyond_a_segment(tmp_path):
    """A guess among eight keys once in seven tokens, in three of four segments, costs 3/4 ln(8) / 7 = 0.22 nats."""
    case = next(case for case in BOUNDED if case.row.name == "retnet")
    losses = {}
    for kind in ("with", "without"):
        options = {"max_steps": 160, "learning_rate": 1e-2, "logging_steps": 20}
        trainer = make_trainer(tmp_path, case.build(torch.float32), rows=8, documents=key_texts(320), **options)
        if kind == "without":  # each batch is taken for the start of a text
            trainer.data_collator = lambda rows: collate_segments(rows) | {"position_ids": torch.arange(7).repeat(8, 1)}
        trainer.train()
        losses[kind] = curve(trainer)[-1]
    assert losses["with"] < 0.5 * losses["without"] and 0.2 < losses["without"] < 0.26


def test_adapters_train_on_streams(tmp_path):
    case = next(case for case in BOUNDED if case.row.name == "retnet")
    model = case.build(torch.float32)
    trainer = make_trainer(tmp_path, get_peft_model(model, hf_arch.lora_config(model, r=2)), max_steps=3)
    trainer.train()
    assert trainer.memories[True].cache.get_seq_length() > 0 and len(curve(trainer)) == 3


def test_what_cannot_work_is_refused(row_case, tmp_path):
    case = row_case if row_case in BOUNDED else BOUNDED[0]
    model = case.build(torch.float32)
    with pytest.raises(ValueError, match="runs layers twice"):
        make_trainer(tmp_path, model, gradient_checkpointing=True, max_steps=2).train()
    model = case.build(torch.float32)
    trainer = make_trainer(tmp_path, model)
    trainer.train_dataset = Segments(texts(), SEGMENT, 5)
    with pytest.raises(ValueError, match=r"rows=5.*give rows=2"):
        trainer.train()
    trainer.train_dataset = [{"input_ids": [5, 6]}]
    with pytest.raises(TypeError, match=r"takes hf_arch.Segments, not a list"):
        trainer.train()
    if row_case not in BOUNDED:
        with pytest.raises(ValueError, match="remembers everything|no memory that a trainer"):
            make_trainer(tmp_path, row_case.build(torch.float32)).train()
    with pytest.raises(AttributeError, match="no attribute 'Semgents'"):
        hf_arch.Semgents  # noqa: B018
    assert hf_arch.Segments is Segments and hf_arch.StatefulTrainer is StatefulTrainer
