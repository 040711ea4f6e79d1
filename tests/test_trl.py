"""trl trains adapters of our decoders: supervised, packed and by preferences; as docs/tools.md says."""

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from torch.testing import assert_close
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tools_page
from hf_arch import byte_tokenizer, find, lora_config
from promises import some_tokens

TEXTS = Dataset.from_list([{"text": f"{n} and {n} is {2 * n}." * (1 + n % 3)} for n in range(24)])
CHOICES = Dataset.from_list([{"prompt": f"{n}:", "chosen": " yes, yes", "rejected": " no, no"} for n in range(8)])


def build(name: str, folder):
    """A tiny model that reads bytes, saved in `folder`, with an adapter."""
    torch.manual_seed(0)
    row = find(name)
    config = row.tiny_config("ForCausalLM", vocab_size=256, pad_token_id=255, initializer_range=0.1)
    model = row.load("ForCausalLM")(config)
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return get_peft_model(model, lora_config(model, r=4))


def arguments(kind, folder, **options):
    told = {"learning_rate": 5e-2, "per_device_train_batch_size": 8, "max_length": 96, "bf16": False, "use_cpu": True}
    told |= {"report_to": "none", "logging_steps": 1, "dataloader_pin_memory": False, "disable_tqdm": True}
    return kind(str(folder), **(told | options))


def train(trainer) -> list[float]:
    """The losses."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "name, packing",
    [("transformer", False), ("ssd", True), ("transformer_xl", False), ("mixtral", True), ("hnet", True)],
)
def test_supervised_training_of_adapters(name, packing, tmp_path):
    model = build(name, tmp_path / "base")
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    told = arguments(SFTConfig, tmp_path / "run", max_steps=6, packing=packing)
    trainer = SFTTrainer(model, told, train_dataset=TEXTS, processing_class=byte_tokenizer())
    losses = train(trainer)
    assert losses[-1] < 0.95 * losses[0]
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed and all("lora_" in key for key in changed)
    trainer.save_model(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    tokens = some_tokens(1, 30)
    assert_close(loaded(tokens).logits, model.eval()(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ssd", "hnet"])
def test_packed_texts_do_not_meet(name, tmp_path):
    """Without a flash kernel, too: the loss of texts in one row is that of texts with padding."""
    model = build(name, tmp_path / "base")
    texts, losses = TEXTS.select(range(6)), []
    for packing in (False, True):
        told = arguments(SFTConfig, tmp_path / "run", packing=packing, router_aux_loss_coef=0.0)
        trainer = SFTTrainer(model, told, train_dataset=texts, eval_dataset=texts, processing_class=byte_tokenizer())
        (batch,) = trainer.get_eval_dataloader()
        assert (len(batch["input_ids"]) == 1) == packing == ("attention_mask" not in batch)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_preferences(tmp_path):
    model = build("retnet", tmp_path / "base")
    told = arguments(DPOConfig, tmp_path / "run", max_steps=6)
    losses = train(DPOTrainer(model, args=told, train_dataset=CHOICES, processing_class=byte_tokenizer()))
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.7 * losses[0]


class OwnLossTrainer(SFTTrainer):
    """As docs/tools.md has it."""

    compute_loss = Trainer.compute_loss


@pytest.mark.parametrize("kind, learns", [(SFTTrainer, False), (OwnLossTrainer, True)])
def test_what_a_row_adds_to_its_loss_is_learned_by_its_own_loss(kind, learns, tmp_path):
    row = find("deepseek")
    model = row.load("ForCausalLM")(row.tiny_config("ForCausalLM", vocab_size=256, num_nextn_predict_layers=1))
    before = {key: parameter.clone() for key, parameter in model.model.mtp.named_parameters()}
    told = arguments(SFTConfig, tmp_path, max_steps=1, router_aux_loss_coef=0.0)
    kind(model, told, train_dataset=TEXTS, processing_class=byte_tokenizer()).train()
    changed = [key for key, parameter in model.model.mtp.named_parameters() if not torch.equal(parameter, before[key])]
    assert bool(changed) == learns


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = tools_page.run("trl")
    assert any("lora_" in name for name, _ in names["trainer"].model.named_parameters())
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
