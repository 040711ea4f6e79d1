"""Training buffers change once per optimizer step, whatever drives it, and for nothing else. (Over several processes:
test_distributed.py.)"""

import copy
import gc
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
from transformers import Trainer, TrainingArguments

from training_buffer_toy import ToyConfig, ToyForCausalLM, buffers


class WritesToData(torch.optim.Optimizer):
    """As many optimizers outside torch do: no version counter rises."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)


OPTIMIZERS = {
    "adamw, foreach": lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
    "adamw, fused": lambda parameters: AdamW(parameters, lr=0.01, fused=True),
    "adamw, no learning rate yet": lambda parameters: AdamW(parameters, lr=0.0),
    "sgd": lambda parameters: SGD(parameters, lr=0.1),
    "writes to .data": WritesToData,
}
ADAMW = OPTIMIZERS["adamw, fused"]


@pytest.fixture
def model():
    return toy()


def toy(**fields):
    torch.manual_seed(0)
    return ToyForCausalLM(ToyConfig(**fields)).train()


def batch(seed: int, rows: int = 4) -> torch.Tensor:
    return torch.randint(3, 32, (rows, 12), generator=torch.Generator().manual_seed(seed))


def learn(model, ids: torch.Tensor, share: float = 1.0) -> None:
    (model(ids, labels=ids).loss * share).backward()


def train(model, make_optimizer=ADAMW, steps: int = 3, pieces: int = 1):
    """Optimizer steps on a batch in `pieces`."""
    optimizer = make_optimizer(model.parameters())
    for step in range(steps):
        for ids in batch(step).chunk(pieces):
            learn(model, ids, 1 / pieces)
        optimizer.step()
        optimizer.zero_grad()
    return model


def changed(before: dict, model: nn.Module) -> list[str]:
    return [name for name, value in buffers(model).items() if not torch.equal(value, before[name])]


def assert_same(model, other, **tolerance):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), **tolerance or {"atol": 0, "rtol": 0})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_change_once_per_optimizer_step(optimizer, model):
    before = buffers(model)
    once, pieces = train(model, OPTIMIZERS[optimizer]), train(toy(), OPTIMIZERS[optimizer], pieces=2)
    assert changed(before, once) == list(before)
    for trained in (once, pieces):
        features = trained.model.layers[0].mixer.features
        assert features.drawn == 3 and features.tokens == 3 * batch(0).numel()
    assert_same(once, pieces, atol=1e-5, rtol=1e-4)


def test_nothing_changes_before_the_step(model):
    before = buffers(model)
    for seed in range(3):
        learn(model, batch(seed))
    assert changed(before, model) == []


def test_evaluation_and_passes_without_gradient_do_not_count(model):
    optimizer, before = ADAMW(model.parameters()), buffers(model)
    learn(model.eval(), batch(0))
    with torch.no_grad():
        model.train()(batch(0))
    with torch.inference_mode():
        model(batch(0))
    optimizer.step()
    assert changed(before, model) == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_does_not_count(model, use_reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    plain = train(toy(), pieces=2)
    assert_same(train(model, pieces=2), plain, atol=1e-6, rtol=1e-5)  # norms without gradients round in another way


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_is_eager(checkpointing):
    model = toy(num_hidden_layers=1)
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch._dynamo.reset()
    train(torch.compile(model, backend="aot_eager", fullgraph=not checkpointing), steps=2, pieces=2)
    assert_same(model, train(toy(num_hidden_layers=1), steps=2, pieces=2), atol=1e-6, rtol=1e-5)


def test_two_optimizers_are_one_step(model):
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    optimizers = SGD(norms, lr=0.1), SGD(matrices, lr=0.1)
    learn(model, batch(0))
    for optimizer in optimizers:
        optimizer.step()
    assert_same(model, train(toy(), OPTIMIZERS["sgd"], steps=1))


def test_the_step_of_another_model_does_not_count(model):
    before = buffers(model)
    learn(model, batch(0))
    train(toy())
    assert changed(before, model) == []


def test_a_copy_changes_alone(model):
    before = buffers(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(train(twin), train(toy()))
    assert changed(before, model) == []


def test_a_model_leaves_no_hook_behind():
    gc.collect()
    before = len(hooks)
    model = train(toy())
    assert len(hooks) == before + 1
    del model
    gc.collect()
    assert len(hooks) == before


def test_adapters_alone_change_nothing(model, tmp_path):
    before = {f"base_model.model.{name}": value for name, value in buffers(model).items()}
    tuned = train(get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)))
    assert changed(before, tuned) == []
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy(), tmp_path)
    torch.testing.assert_close(loaded.eval()(batch(9)).logits, tuned.eval()(batch(9)).logits)


def test_saved_with_the_model(model, tmp_path):
    train(model).save_pretrained(tmp_path)
    assert_same(ToyForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_resumed_trainer_run_is_the_uninterrupted_one(tmp_path, optim):
    rows = [{"input_ids": ids, "labels": ids} for ids in batch(0, rows=24)]

    def trainer(steps: int, folder: str) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            optim=optim,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model=toy(), args=arguments, train_dataset=rows)

    whole, resumed = trainer(6, "whole"), trainer(6, "resumed")
    whole.train()
    trainer(3, "resumed").train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
    assert resumed.model.model.layers[0].mixer.features.drawn == 6
    assert_same(resumed.model, whole.model)
