"""What sets the memory of state spaces trains at a rate of its own and does not decay."""

import re

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import hf_arch
from hf_arch import find, parameter_groups
from promises import some_tokens

STATES = {
    "s4": {"state_space.log_step", "state_space.A_log", "state_space.A_imag", "state_space.B", "state_space.P"},
    "s6": {"A_log", "D", "dt_proj.bias"},
    "ssd": {"A_log", "D", "dt_bias"},
}


def tiny(name):
    torch.manual_seed(0)
    return find(name).load("ForCausalLM")(find(name).tiny_config("ForCausalLM"))


@pytest.mark.parametrize("name", STATES)
def test_every_parameter_is_in_one_group_and_states_in_theirs(name):
    model = tiny(name)
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    assert {names[id(p)].split(".mixer.")[1] for p in groups[2]["params"]} == STATES[name]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.1), (1e-2, 0.0), (1e-3, 0.0)]
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])
    assert parameter_groups(model, lr=1e-4)[2]["lr"] == 1e-4 and parameter_groups(model, 1, state_lr=5)[2]["lr"] == 5


def test_others_have_no_such_group_and_frozen_parameters_are_left_out():
    assert len(parameter_groups(tiny("transformer"), lr=1e-3)) == 2
    adapted = get_peft_model(tiny("s6"), hf_arch.lora_config(find("s6").tiny_config()))
    (group,) = parameter_groups(adapted, lr=1e-3, weight_decay=0.1)
    assert len(group["params"]) == sum(parameter.requires_grad for parameter in adapted.parameters())


def test_a_trainer_schedules_all_groups(tmp_path):
    model = tiny("s4")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.5, state_lr=0.0))
    told = {"report_to": [], "max_steps": 4, "lr_scheduler_type": "linear", "per_device_train_batch_size": 2}
    data = [{"input_ids": row, "labels": row} for row in some_tokens(8)]
    trainer = Trainer(model, TrainingArguments(tmp_path, **told), train_dataset=data, optimizers=(optimizer, None))
    rates = []
    optimizer.register_step_pre_hook(lambda *given: rates.append([group["lr"] for group in optimizer.param_groups]))
    trainer.train()
    assert len(rates) == 4 and rates[0] == [0.1, 0.1, 0.0] and rates[3][0] == pytest.approx(0.025)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".mixer.")[1] for name in before.keys() - changed} == STATES["s4"]


@pytest.mark.parametrize("name, levels", [("hourglass", 2), ("megabyte", 2), ("hnet", 2)])
def test_levels_of_a_hierarchy_train_at_rates_of_their_own(name, levels, tmp_path):
    model = tiny(name)
    assert model.config.num_levels == levels
    factors = [2.0, 0.5]
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, state_lr=1e-4, level_factors=factors))
    told = TrainingArguments(tmp_path, report_to=[], max_steps=1, lr_scheduler_type="constant")
    data = [{"input_ids": row, "labels": row} for row in some_tokens(8)]
    trainer = Trainer(model, told, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    rates = {id(parameter): group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    states = {
        id(module.get_parameter(state))
        for module in model.modules()
        for state in getattr(module, "state_parameters", ())
    }
    assert len(rates) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        base = rates[id(parameter)] / (1e-4 if id(parameter) in states else 1e-3)
        layer = re.match(r"model\.layers\.(\d+)\.", key)
        level = model.config.layer_levels[int(layer[1])] if layer else 0
        if layer or re.match(r"model\.(embed_tokens|norm|resamplings\.0)|lm_head", key):
            assert base == pytest.approx(factors[level]), key


def test_levels_are_asked_of_what_has_them():
    with pytest.raises(ValueError, match="2 level_factors, but the model has no levels"):
        parameter_groups(tiny("s4"), lr=1e-3, level_factors=[2, 1])
    with pytest.raises(ValueError, match="3 level_factors, but the model has 2 levels"):
        parameter_groups(tiny("hourglass"), lr=1e-3, level_factors=[3, 2, 1])
