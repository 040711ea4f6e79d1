"""H3: equal to the authors' layers, and what their paper says of them.

The golden answers are those of the authors' code in float64 (`goldens/make_h3_original.py`).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from hf_arch import find
from hf_arch.convert import convert

GOLDEN = Path(__file__).parent / "goldens" / "h3_original.safetensors"
ROW = find("h3")
EXACT = {"atol": 1e-8, "rtol": 1e-8}
with safe_open(GOLDEN, "pt") as file:
    MODELS = json.loads(file.metadata()["models"])


def checkpoint(folder, name, change=dict):
    """The golden's model as the authors publish theirs, and its answers. In float64, since the taps of the shift are
    sums of products."""
    found = {key.removeprefix(f"{name}/"): x for key, x in load_file(GOLDEN).items() if key.startswith(f"{name}/")}
    weights = {key.removeprefix("weights."): x.double() for key, x in found.items() if key.startswith("weights.")}
    torch.save(change(weights), folder / "model.pt")
    return found


def by_old_names(weights):
    """As the authors' first checkpoints: other names, each norm with the part before it, in a trainer's wrapping."""
    moved = ["backbone.norm", *(f"backbone.layers.{layer}.norm{part}" for layer in range(3) for part in (1, 2))]
    places = [*moved[1:], "backbone.ln_f"]
    old = dict(zip(places, moved, strict=True))
    names = {key: old.get(key.rpartition(".")[0], key.rpartition(".")[0]) + key[key.rindex(".") :] for key in weights}
    names = {
        key: name.replace("backbone.embeddings.word_embeddings", "embedding").replace("backbone", "s4seq.encoder")
        for key, name in names.items()
    }
    return {"state_dict": {f"model.{names[key]}": x for key, x in weights.items()}}


@pytest.mark.parametrize("change", [dict, by_old_names])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equals_the_authors(name, change, tmp_path):
    told = checkpoint(tmp_path, name, change)
    choices = {"num_attention_heads": 2} if MODELS[name]["attends"] else {}
    model = convert(tmp_path, "h3", **choices).double()
    assert model.config.state_head_dim == MODELS[name]["head_dim"]
    logits = model(told["ids"]).logits
    assert_close(logits, told["logits"], **EXACT)
    step = model(told["ids"][:, :70], use_cache=True)
    for t in range(70, 90):
        step = model(told["ids"][:, t : t + 1], past_key_values=step.past_key_values)
        assert_close(step.logits[:, 0], told["logits"][:, t], **EXACT)


def test_what_the_tensors_do_not_tell_is_asked_for(tmp_path):
    checkpoint(tmp_path, "hybrid")
    with pytest.raises(ValueError, match="give num_attention_heads"):
        convert(tmp_path, "h3")
    checkpoint(
        tmp_path,
        "hybrid",
        lambda weights: weights | {"backbone.layers.1.mixer.rotary_emb.inv_freq": weights["lm_head.weight"]},
    )
    with pytest.raises(ValueError, match="rotary"):
        convert(tmp_path, "h3", num_attention_heads=2)
    torch.save({"embedding.weight": torch.zeros(3, 4)}, tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="config.json"):
        convert(tmp_path, "h3")


@torch.no_grad()
def test_a_key_meets_a_value_that_comes_after_it():
    """The shift remembers which token came before: what associative recall asks (arXiv:2212.14052, section 3.1). With
    taps that name the token before and a state that never fades, a value is kept where its key stood before it."""
    config = ROW.tiny_config(hidden_size=4, state_head_dim=1, num_hidden_layers=1, state_size=2, attention_bias=False)
    mixer = ROW.load("Model")(config).double().layers[0].mixer
    for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj):
        projection.weight.copy_(torch.eye(4))
    mixer.shift.weight.copy_(torch.tensor([1.0, 0.0]))  # the token before
    space = mixer.state_space
    for parameter, value in ((space.A_log, -30.0), (space.A_imag, 0.0), (space.D, 0.0), (space.log_step, 0.0)):
        parameter.fill_(value)
    space.B.copy_(torch.tensor([1.0, 0.0]))
    space.C.copy_(torch.tensor([0.5, 0.0]))
    x = torch.randn(1, 90, 4, dtype=torch.float64)
    before = torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
    assert_close(mixer(x), x * (before * x).cumsum(1), **EXACT)


def test_contradictions_are_refused():
    with pytest.raises(Exception, match="not a multiple of state_head_dim 5"):
        ROW.tiny_config(state_head_dim=5)
