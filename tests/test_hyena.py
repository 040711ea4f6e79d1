"""Hyena answers as the authors' code does, keeps filters that are those of its parameters, and can be distilled.

The golden answers are those of the authors' standalone HyenaDNA, in float64 (`goldens/make_hyena_original.py`).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from hf_arch.convert import convert
from promises import EXACT, ROWS

GOLDEN = Path(__file__).parent / "goldens" / "hyena_original.safetensors"
CASE = next(case for case in ROWS if case.row.name == "hyena")


def checkpoint(folder, model, rename=lambda name: name, **more):
    """The golden's model in the layout of the authors, as a checkpoint of Lightning, and what it answers."""
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[model]
    found = {key.removeprefix(f"{model}."): x for key, x in load_file(GOLDEN).items() if key.startswith(f"{model}.")}
    weights = {rename(key.removeprefix("weights.")): x for key, x in found.items() if key.startswith("weights.")}
    weights["model.lm_head.weight"] = weights["model.backbone.embeddings.word_embeddings.weight"].clone()
    (folder / "config.json").write_text(json.dumps(fields | more))
    torch.save({"state_dict": weights, "epoch": 3}, folder / "weights.ckpt")
    return found


@torch.no_grad()
@pytest.mark.parametrize("model", ["released", "third order"])
def test_equals_the_authors_code(model, tmp_path):
    expected = checkpoint(tmp_path, model)
    ours = convert(tmp_path, "hyena").double()
    hidden = ours.model(expected["ids"]).last_hidden_state
    assert hidden.std() > 0.5
    assert_close(hidden, expected["hidden_states"], **EXACT)
    head = ours.model.embed_tokens.weight
    assert ours.lm_head.weight is head and ours.config.vocab_size == 16
    assert_close(ours(expected["ids"]).logits, expected["hidden_states"] @ head.T, **EXACT)


@torch.no_grad()
def test_a_checkpoint_of_gradient_checkpointing(tmp_path):
    wrapped = lambda name: name.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer.")  # noqa: E731
    expected = checkpoint(tmp_path, "released", wrapped, checkpoint_mixer=True, checkpoint_mlp=True)
    ours = convert(tmp_path, "hyena", head="Model").double()
    assert_close(ours(expected["ids"]).last_hidden_state, expected["hidden_states"], **EXACT)


@torch.no_grad()
def test_the_layout_for_transformers(tmp_path):
    expected = checkpoint(tmp_path, "released")
    tensors = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
    (tmp_path / "weights.ckpt").unlink()
    tensors = {name.replace("model.backbone", "hyena.backbone"): tensor for name, tensor in tensors.items()}
    tensors = {
        name: tensor for name, tensor in tensors.items() if not name.endswith(("3.freq", "5.freq", "lm_head.weight"))
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    fields = {"model_type": "hyenadna", "architectures": ["HyenaDNAForCausalLM"], "d_model": 12, "n_layer": 2}
    fields |= {"d_inner": 16, "vocab_size": 12, "pad_vocab_size_multiple": 8, "max_seq_len": 100, "emb_dim": 5}
    fields |= {"filter_order": 16, "hyena_order": 2, "short_filter_order": 3, "activation_freq": 10}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = convert(tmp_path, "hyena").double()
    assert_close(ours.model(expected["ids"]).last_hidden_state, expected["hidden_states"], **EXACT)


def test_what_cannot_be_converted_is_refused(tmp_path):
    checkpoint(tmp_path, "released", attn_layer_idx=[1])
    with pytest.raises(ValueError, match="attn_layer_idx"):
        convert(tmp_path, "hyena")
    checkpoint(tmp_path, "released")
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    saved["state_dict"]["model.backbone.layers.1.mixer.filter_fn.pos_emb.z"] += 0.1
    torch.save(saved, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="pos_emb.z was trained"):
        convert(tmp_path, "hyena")
