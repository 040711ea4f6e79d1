"""What routers did: statistics of one answer, and of a training run."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import hf_arch
from promises import Case, some_tokens

MIXTRAL = Case(hf_arch.find("mixtral"), "ForCausalLM")


@torch.no_grad()
def test_statistics_count_what_was_chosen():
    model, tokens = MIXTRAL.build(torch.float32), some_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :20] = 0
    outputs = model(tokens, attention_mask=mask, output_router_logits=True)
    found = hf_arch.routing_statistics(outputs)
    for layer, (logits, choices) in enumerate(zip(outputs.router_logits, outputs.router_choices, strict=True)):
        real = mask.flatten().bool()
        taken = logits[real].topk(2).indices
        assert torch.equal(choices[real].sort().values, taken.sort().values)
        assert_close(found.load[layer], torch.bincount(taken.flatten(), minlength=4) / taken.numel())
        chance = logits[real].softmax(-1)
        assert_close(found.entropy[layer], -(chance * chance.log()).sum(-1).mean())
    assert not found.dropped.any() and found.load.shape == (2, 4)
    with pytest.raises(ValueError, match="output_router_logits=True"):
        hf_arch.routing_statistics(model(tokens))


def test_the_dropped_are_a_share_of_the_choices():
    fields = {"feed_forward_types": ["switch", "switch"], "num_experts_per_tok": 1, "expert_capacity_factor": 0.5}
    model = MIXTRAL.build(torch.float32, **fields).train()
    outputs = model(some_tokens(), output_router_logits=True)
    found = hf_arch.routing_statistics(outputs)
    assert_close(found.dropped[1], (outputs.router_choices[1] == 4).float().mean())
    assert found.dropped.min() >= 0.48
    assert_close(found.load.sum(1), torch.ones(2))


@torch.no_grad()
def test_experts_that_choose_are_equally_busy_and_pass_tokens_over():
    fields = {"feed_forward_types": ["gated", "expert_choice"], "num_local_experts": 4, "expert_token_share": 0.1}
    encoder = Case(hf_arch.find("transformer"), "ForMaskedLM").build(torch.float32, **fields).model
    found = hf_arch.routing_statistics(encoder(some_tokens(), output_router_logits=True))
    assert_close(found.load, torch.full((1, 4), 0.25))
    assert 0.599 < found.dropped < 0.7  # of 140 tokens, 4 x 14 are taken at most


def trained(model, callback, folder, **options) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in some_tokens(batch=8, length=24)]
    told = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 2, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(folder, save_strategy="no", disable_tqdm=True, **told | options)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def test_a_training_run_is_told_and_drawn(tmp_path):
    callback = hf_arch.RoutingCallback(plot=tmp_path / "routing.png")
    trainer = trained(MIXTRAL.build(torch.float32), callback, tmp_path)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [step for step, _ in callback.history] == [2, 4]
    for entry, (_, found) in zip(entries, callback.history, strict=True):
        assert_close(entry["routing/1/busiest"], 4 * float(found.load[1].max()))
        assert 0 < entry["routing/0/entropy"] <= math.log(4) and entry["routing/0/dropped"] == 0
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    hooks = [part._forward_hooks for part in trainer.model.modules()]
    assert not any(hooks)  # it leaves the model as it was


def test_checkpointing_and_adapters_are_watched_alike(tmp_path):
    """A layer that backward computes anew is counted twice, which changes no share."""
    plain, again = hf_arch.RoutingCallback(), hf_arch.RoutingCallback()
    model = MIXTRAL.build(torch.float32)
    model.add_adapter(hf_arch.lora_config(model, target_parameters=None))
    trained(model, plain, tmp_path, learning_rate=0.0)
    model = MIXTRAL.build(torch.float32)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trained(model, again, tmp_path, learning_rate=0.0, **options)
    for (_, one), (_, other) in zip(plain.history, again.history, strict=True):
        assert_close(one.load, other.load)
        assert_close(one.entropy, other.entropy)


def test_a_model_without_experts_is_refused(tmp_path):
    dense = Case(hf_arch.find("transformer"), "ForCausalLM").build(torch.float32)
    with pytest.raises(ValueError, match="no feed-forward of this model"):
        trained(dense, hf_arch.RoutingCallback(), tmp_path)
