"""Whatever is wrong with a checkpoint of an original is said, with the remedy, and pickled code never runs."""

import json
import os
import sys

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from originals import original, rewrite
from safetensors.torch import load_file, save_file

from hf_arch import find
from hf_arch.convert import convert

convert_module = sys.modules["hf_arch.convert"]


@pytest.fixture
def llama(tmp_path):
    original("llama").save_pretrained(tmp_path)
    return tmp_path


def change(folder, **tensors):
    """Add tensors to a checkpoint; None takes one away."""
    path = folder / "model.safetensors"
    found = load_file(path) | {key.replace("__", "."): x for key, x in tensors.items()}
    save_file({key: x for key, x in found.items() if x is not None}, path, {"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        convert(tmp_path / "nothing", "transformer")


def test_a_file_instead_of_a_folder(llama):
    with pytest.raises(NotADirectoryError, match="give the folder"):
        convert(llama / "model.safetensors", "transformer")


def test_a_repository_that_cannot_be_read(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(convert_module, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="There is no folder someone/llama, and no such repository"):
        convert("someone/llama", "transformer")


def test_a_repository_of_the_hub(llama, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns, **kwargs):
        asked.append((repo, allow_patterns))
        return str(llama)

    monkeypatch.setattr(convert_module, "snapshot_download", snapshot_download)
    convert("someone/llama", "transformer")
    ((repo, patterns),) = asked  # files of torch.save are left where there are safetensors
    assert repo == "someone/llama"
    assert "model*.safetensors" in patterns and not {"*.pt", "*.bin", "pytorch_model*"} & set(patterns)
    rewrite(llama, "bin", "llama")
    convert("someone/llama", "transformer")
    assert "pytorch_model*" in asked[-1][1]


def test_an_unknown_architecture(llama):
    with pytest.raises(ValueError, match="Did you mean transformer"):
        convert(llama, "transformr")


def test_a_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert(tmp_path, "transformer")


def test_a_config_that_is_no_json(llama):
    (llama / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        convert(llama, "transformer")


def test_a_folder_without_weights(llama):
    (llama / "model.safetensors").rename(llama / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"Looking for weights .*model\.safetensors.* found none"):
        convert(llama, "transformer")


def test_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter: merge"):
        convert(tmp_path, "transformer")


def test_truncated_safetensors(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"model\.safetensors cannot be read .*download it again"):
        convert(llama, "transformer")


@pytest.mark.parametrize("kept", [0, 0.5])
def test_truncated_bin(llama, kept):
    rewrite(llama, "bin", "llama")
    path = llama / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(OSError, match=r"pytorch_model\.bin cannot be read .*download it again"):
        convert(llama, "transformer")


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_does_not_run(llama):
    (llama / "model.safetensors").unlink()
    torch.save({"weight": RunsCode(str(llama / "ran"))}, llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code and are not opened"):
        convert(llama, "transformer")
    assert not (llama / "ran").exists()


def test_a_file_of_something_else(llama):
    (llama / "model.safetensors").unlink()
    torch.save(torch.ones(3), llama / "weights.pt")
    with pytest.raises(ValueError, match="holds no state_dict"):
        convert(llama, "transformer")


def test_a_lone_file_of_a_trainer(llama):
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save({"model": tensors, "step": 3}, llama / "last.pt")
    torch.save({}, llama / "optimizer.pt")
    convert(llama, "transformer")
    torch.save({"model": tensors, "step": 2}, llama / "best.pt")
    with pytest.raises(FileNotFoundError, match=r"several: best\.pt, last\.pt; keep one"):
        convert(llama, "transformer")


def test_a_shard_that_is_not_there(llama):
    rewrite(llama, "sharded", "llama")
    (llama / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 1 files that are not there: model-00002-of-00003"):
        convert(llama, "transformer")


def test_a_damaged_index(llama):
    rewrite(llama, "sharded", "llama")
    (llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(OSError, match=r"index\.json is damaged"):
        convert(llama, "transformer")


def test_a_foreign_checkpoint(llama):
    change_config(llama, model_type="bloom")
    with pytest.raises(
        ValueError, match="a 'bloom' checkpoint.*transformer from llama, gpt2, bert;.*retnet from retnet"
    ):
        convert(llama, "transformer")


def test_a_checkpoint_of_another_architecture(llama):
    with pytest.raises(ValueError, match="a 'llama' checkpoint, which cannot become 'retnet'"):
        convert(llama, "retnet")


def test_a_checkpoint_of_ours(tmp_path):
    row = find("transformer")
    row.load("Model")(row.tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of hf_arch already .*load it with an Auto class"):
        convert(tmp_path, "transformer")


def test_a_class_without_counterpart(llama):
    change_config(llama, architectures=["LlamaForImages"])
    with pytest.raises(ValueError, match="LlamaForImages has no counterpart; LlamaForCausalLM, LlamaModel"):
        convert(llama, "transformer")


def test_a_quantised_checkpoint(llama):
    change_config(llama, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match="is quantised: convert the checkpoint that it was made from"):
        convert(llama, "transformer")


@pytest.mark.parametrize(
    "name, field, value",
    [("bert", "is_decoder", True), ("gpt2", "scale_attn_by_inverse_layer_idx", True)]
    + [("bert", "position_embedding_type", "relative_key")],
)
def test_a_choice_that_ours_does_not_have(name, field, value, tmp_path):
    original(name).save_pretrained(tmp_path)
    change_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=f"{field} is {value!r} in config.json; only"):
        convert(tmp_path, "transformer")


def test_tensors_that_do_not_fit(llama):
    change(llama, model__layers__0__self_attn__q_proj__lora=torch.ones(2))
    with pytest.raises(ValueError, match="1 tensors that no rule knows: model.layers.0.self_attn.q_proj.lora"):
        convert(llama, "transformer")


def test_tensors_that_the_config_does_not_expect(llama):
    change(llama, model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    with pytest.raises(ValueError, match="the config leaves no place for: model.layers.0.self_attn.q_proj.bias"):
        convert(llama, "transformer")


def test_tensors_that_are_missing(llama):
    change(llama, model__norm__weight=None, lm_head__weight=None)
    with pytest.raises(ValueError, match="2 parameters that the checkpoint does not have: lm_head.weight, model.norm"):
        convert(llama, "transformer")


def test_tensors_of_another_shape(llama):
    change(llama, model__norm__weight=torch.ones(7))
    with pytest.raises(ValueError, match=r"model\.norm\.weight \[7\], not \[32\]"):
        convert(llama, "transformer")


def test_tied_tensors_that_differ(llama):
    change_config(llama, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="are tied, but differ: model.embed_tokens.weight and lm_head.weight"):
        convert(llama, "transformer")


def test_two_names_of_one_tensor_that_differ(tmp_path):
    original("bert").save_pretrained(tmp_path)
    change(tmp_path, cls__predictions__bias=torch.ones(61), cls__predictions__decoder__bias=torch.zeros(61))
    with pytest.raises(ValueError, match="should be equal: cls.predictions"):
        convert(tmp_path, "transformer")
