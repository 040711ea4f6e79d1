"""Promise 7: LoRA by default targets trains only adapters, all of them, and survives saving, merging and switching."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

import hf_arch
from hf_arch.lora import TASKS, bare_matrices, targets
from promises import EXACT


def adapted(case, config=None, **fields):
    model = case.build()
    torch.manual_seed(1)
    model = get_peft_model(model, config or hf_arch.lora_config(model, r=2, **fields)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which hides all
                parameter.normal_(std=0.3)
    return model.eval()


def test_default_targets_are_known_to_peft(model_case, tokens):
    by_peft = adapted(model_case, LoraConfig(r=2))
    by_us = adapted(model_case)
    names = {name for name, _ in by_us.named_parameters() if "lora_" in name}
    known = {name for name, _ in by_peft.named_parameters() if "lora_" in name}
    assert known == {name for name in names if ".experts." not in name}  # PEFT has no default for stacked experts
    assert (names != known) == by_us.base_model.model.config.has_experts
    assert by_us.peft_config["default"].task_type == TASKS.get(model_case.head)
    config = hf_arch.lora_config(model_case.config())
    assert set(config.target_modules) == set(targets(model_case.row)) and config.task_type is None
    get_peft_model(model_case.build(), IA3Config())


def test_only_adapters_train_and_each_changes_the_answer(model_case, tokens):
    model = adapted(model_case)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert not [name for name, p in model.named_parameters() if "lora_" in name and not p.grad.any()]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                kept = parameter.clone()
                parameter.zero_()
                assert (model(input_ids=tokens).logits - expected).abs().max() > 1e-6, name
                parameter.copy_(kept)
    adapted_modules = {name.split(".lora_")[0].rpartition(".")[-1] for name in trained if ".experts." not in name}
    assert adapted_modules == {name for name in targets(model_case.row) if any(f".{name}." in each for each in trained)}


@torch.no_grad()
def test_save_load_merge_and_generate(model_case, tokens, tmp_path):
    model = adapted(model_case)
    expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_case.build(), tmp_path).double().eval()
    assert_close(loaded(input_ids=tokens).logits, expected, **EXACT)
    generates = model_case.row.load(model_case.head).can_generate()
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    generated = model.generate(input_ids=tokens, **greedy) if generates else None
    merged = loaded.merge_and_unload()
    assert_close(merged(tokens).logits, expected, **EXACT)
    if generates:
        assert torch.equal(merged.generate(tokens, **greedy), generated)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert_close(again(tokens).logits, expected, **EXACT)


@torch.no_grad()
def test_two_adapters_take_turns(model_case, tokens):
    model = adapted(model_case)
    first = model(input_ids=tokens).logits
    model.add_adapter("second", hf_arch.lora_config(model_case.config(), r=3))
    model.set_adapter("second")
    model.double()
    with model.disable_adapter():
        base = model(input_ids=tokens).logits
    assert_close(base, model_case.build()(tokens).logits, **EXACT)
    assert_close(model(input_ids=tokens).logits, base, **EXACT)  # the second is still at its beginning
    model.set_adapter("default")
    assert_close(model(input_ids=tokens).logits, first, **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_under_gradient_checkpointing(model_case, tokens, reentrant):
    def gradients(checkpointing):
        model = adapted(model_case).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}

    plain, checkpointed = gradients(False), gradients(True)
    for name in plain:
        assert_close(checkpointed[name], plain[name], **EXACT, msg=name)


def test_stacked_experts_are_found_and_foreign_models_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 4))
            self.down_proj = nn.Parameter(torch.zeros(3, 4, 4))

    model = nn.ModuleDict({f"layer{i}": nn.ModuleDict({"experts": Experts()}) for i in range(2)})
    assert bare_matrices(model) == ["experts.gate_up_proj", "experts.down_proj"]
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="No architecture is called 'gpt2'"):
        hf_arch.lora_config(GPT2Config())
