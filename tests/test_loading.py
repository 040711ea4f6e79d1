"""Promise 1: loading and saving through the Auto classes, key names and config JSON that do not change by accident."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import hf_arch
from hf_arch.architecture import AUTO_CLASSES
from hf_arch.registration import register
from promises import EXACT, inputs_and_labels

GOLDENS = Path(__file__).parent / "goldens"


def answer(case, model):
    inputs = inputs_and_labels(case, model)
    return model(input_ids=inputs["input_ids"])[0]


@torch.no_grad()
def test_save_and_load_through_the_auto_class(head_case, tmp_path):
    model = head_case.build()
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert not list(tmp_path.glob("*.bin")) and len(list(tmp_path.glob("*.safetensors"))) > 1
    auto = getattr(transformers, AUTO_CLASSES[head_case.head])
    loaded, report = auto.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is type(model) and not any(report.values())
    assert_close(answer(head_case, loaded), answer(head_case, model), **EXACT)
    assert type(auto.from_config(model.config)) is type(model)


@torch.no_grad()
def test_unknown_and_missing_keys_are_reported(model_case, tmp_path):
    model = model_case.build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = next(name for name in weights if "layers.1" in name)
    weights["layers.0.stranger"] = weights.pop(missing)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {missing}
    assert [name.removeprefix("model.") for name in report["unexpected_keys"]] == ["layers.0.stranger"]


@torch.no_grad()
def test_the_backbone_of_any_head_loads_into_any_other(model_case, tmp_path):
    model = model_case.build()
    model.model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    missing = report["missing_keys"]
    assert missing and all(name.startswith("lm_head.") for name in missing)
    assert_close(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight, **EXACT)


def test_key_names_and_config_are_the_golden_ones(head_case):
    """A changed key or default breaks checkpoints that users have. What to do then is in CONTRIBUTING.md."""
    model = head_case.build()
    config = model.config.to_dict() | {"transformers_version": None}
    shapes = {name: list(parameter.shape) for name, parameter in model.state_dict().items()}
    golden = GOLDENS / f"{head_case.row.name}_{head_case.head}.json"
    found = json.dumps({"config": config, "shapes": shapes}, indent=1, sort_keys=True) + "\n"
    assert golden.exists(), f"write {golden.name} with: python tests/goldens/write.py {head_case.row.name}"
    assert golden.read_text() == found


def test_registration_is_idempotent_and_overrides_no_one():
    before = {name: dict(getattr(transformers, name)._model_mapping._extra_content) for name in AUTO_CLASSES.values()}
    register()
    assert before == {name: dict(getattr(transformers, name)._model_mapping._extra_content) for name in before}
    assert all(row.model_type.startswith("hf_arch_") for row in hf_arch.ARCHITECTURES)


@pytest.mark.parametrize("name", ["retnett", "hf-arch-retnet", "Transformer"])
def test_names_are_found_or_the_nearest_offered(name):
    if name == "retnett":
        with pytest.raises(ValueError, match="retnet"):
            hf_arch.find(name)
    else:
        assert hf_arch.find(name).name in name.lower()


def test_a_truncated_checkpoint_is_named(model_case, tmp_path):
    model = model_case.build()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"damaged: model\.safetensors"):
        type(model).from_pretrained(tmp_path)


def test_a_foreign_or_missing_checkpoint_is_refused(model_case, tmp_path):
    loads = model_case.row.load(model_case.head)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=9)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(ValueError, match=r"'gpt2' checkpoint.*hf-arch convert"):
        loads.from_pretrained(tmp_path / "gpt2")
    with pytest.raises(OSError, match="nowhere"):
        loads.from_pretrained(tmp_path / "nowhere")
    model_case.config().save_pretrained(tmp_path / "empty")
    with pytest.raises(OSError, match="model.safetensors"):
        loads.from_pretrained(tmp_path / "empty")


def test_an_interrupted_reader_of_another_architecture_is_told(tmp_path):
    case = hf_arch.find("retnet")
    case.load("ForCausalLM")(case.tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'hf_arch_retnet' checkpoint, not 'hf_arch_transformer'"):
        hf_arch.find("transformer").load("ForCausalLM").from_pretrained(tmp_path)
