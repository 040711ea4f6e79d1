"""S4 and S4D: equal to the authors' layers, and what the papers say of them.

The golden answers are those of the authors' code in float64 (`goldens/make_s4_original.py`).
"""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DynamicCache

from hf_arch import find
from hf_arch.modeling.layers.hippo import DIAGONALS, hippo_legs, low_rank_legs
from hf_arch.modeling.ops.diagonal_state_space import chunk_diagonal_state_space, recurrent_diagonal_state_space
from hf_arch.modeling.ops.low_rank_state_space import chunk_low_rank_state_space, low_rank
from promises import Case, some_tokens

GOLDEN = Path(__file__).parent / "goldens" / "s4_original.safetensors"
ROW = find("s4")
EXACT = {"atol": 1e-8, "rtol": 1e-8}
with safe_open(GOLDEN, "pt") as file:
    MODELS = json.loads(file.metadata()["models"])


def mixer(**fields):
    config = ROW.tiny_config(**({"num_hidden_layers": 1, "layer_types": None, "feed_forward_types": None} | fields))
    return ROW.load("Model")(config).double().eval().layers[0].mixer


def ours(name):
    """A layer of ours with the weights of the authors', their input and their answer."""
    fields, found = MODELS[name], load_file(GOLDEN).items()
    told = {key.removeprefix(f"{name}/"): tensor for key, tensor in found if key.startswith(f"{name}/")}
    layer = mixer(
        hidden_size=4,
        layer_types=[fields["mode"]],
        initialization=fields["init"].removeprefix("diag-"),
        discretization=fields.get("disc", "bilinear"),
        direction="bidirectional" if fields.get("bidirectional") else "causal",
    )
    weights = {key.removeprefix("weights."): tensor for key, tensor in told.items() if key.startswith("weights.")}
    state = {
        "out_proj.weight": weights["output_linear.0.weight"],
        "out_proj.bias": weights["output_linear.0.bias"],
        "state_space.D": weights["layer.D"][0],
        "state_space.log_step": weights["layer.kernel.inv_dt"][:, 0],
        "state_space.A_log": weights["layer.kernel.A_real"],
        "state_space.A_imag": -weights["layer.kernel.A_imag"],
        "state_space.B": weights["layer.kernel.B"][0],
        "state_space.C": weights["layer.kernel.C"],
    }
    if fields["mode"] == "s4":
        state["state_space.P"] = weights["layer.kernel.P"][0]
    begun = torch.complex(-layer.state_space.A_log.exp(), layer.state_space.A_imag).detach()
    layer.load_state_dict(state)
    return layer, told, begun


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equals_the_authors(name):
    layer, told, begun = ours(name)
    assert_close(layer(told["x"]), told["y"], **EXACT)
    theirs = torch.complex(-told["start.A_real"].exp(), told["start.A_imag"]).to(begun.dtype)
    for part in ("real", "imag"):  # of pairs of conjugates either may be kept, in any order
        found, expected = (getattr(A, part).abs().sort(dim=-1).values for A in (begun, theirs))
        assert_close(found, expected, atol=2e-4, rtol=1e-5)  # theirs are at least 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if "both" not in name])
def test_steps_equal_the_authors_convolution(name):
    layer, told, _ = ours(name)
    config = ROW.tiny_config(num_hidden_layers=1, layer_types=[MODELS[name]["mode"]], feed_forward_types=["none"])
    cache = DynamicCache(config=config)
    outputs = [layer(x, past_key_values=cache) for x in told["x"].split((66, *[1] * 10, 64), dim=1)]
    assert_close(torch.cat(outputs, dim=1), told["y"], **EXACT)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_hippo_is_diagonal_plus_low_rank(size):
    """Its eigenvalues are -1, -2, ...; with P P^T it is skew-symmetric beside a diagonal of -1/2 (arXiv:2111.00396)."""
    A, B = hippo_legs(size)
    assert_close(torch.linalg.eigvals(A[:9, :9]).real.sort().values, -torch.arange(min(size, 9), 0, -1).double())
    diagonal, P, held = low_rank_legs(size)
    both = [torch.cat((half, half.conj())) for half in (diagonal, P, held)]
    dense = torch.diag(both[0]) - both[1][:, None] * both[1].conj()
    for power in range(1, 4):  # what a similar matrix and vector have in common
        expected = (torch.linalg.matrix_power(A / size, power) @ B) @ B
        found = (torch.linalg.matrix_power(dense / size, power) @ both[2]) @ both[2].conj()
        assert_close(found.real, expected, atol=1e-9, rtol=1e-9)
        assert abs(found.imag) < 1e-9 * abs(found.real)


def test_initialisations_are_those_of_the_paper():
    assert_close(DIAGONALS["lin"](3)[0].imag, math.pi * torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert_close(DIAGONALS["inv"](2)[0].imag, 4 / math.pi * torch.tensor([3.0, 1 / 3], dtype=torch.float64))
    assert_close(DIAGONALS["real"](3)[0].real, -torch.arange(1.0, 4).double())
    assert_close(DIAGONALS["legs"](4)[0], low_rank_legs(8)[0])


def test_the_low_rank_step_is_that_of_the_dense_matrix():
    size = torch.rand(5, dtype=torch.float64)
    diagonal, P, B, readout = torch.randn(4, 5, 3, dtype=torch.complex128)
    diagonal = -diagonal.real.abs() + 1j * diagonal.imag
    pair = [torch.cat((half, half.conj()), dim=-1) for half in (diagonal, P, B, readout)]
    dense = torch.diag_embed(pair[0]) - pair[1][..., None] * pair[1].conj()[..., None, :]
    one, half = torch.eye(6, dtype=torch.complex128), size[:, None, None] / 2
    once = torch.linalg.solve(one - half * dense, one + half * dense)
    added = torch.linalg.solve(one - half * dense, (2 * half * pair[2][..., None]))
    assert_close(low_rank(size, diagonal, P, B).added, added[:, :3, 0])
    kernel = [pair[3].conj()[:, None] @ torch.linalg.matrix_power(once, lag) @ added for lag in range(100)]
    pulse = torch.zeros(1, 100, 5, dtype=torch.float64)
    pulse[:, 0] = 1
    skip = torch.zeros(5, dtype=torch.float64)
    found, _ = chunk_low_rank_state_space(pulse, size, diagonal, P, B, 2 * readout[None], skip)
    assert_close(found[0], torch.cat(kernel, dim=-1)[:, 0].real.T, **EXACT)


@pytest.mark.parametrize("packed", [False, True])
def test_two_readouts_hear_of_what_comes_before_and_after(packed):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 150, 5, dtype=torch.float64, generator=generator)
    length = torch.rand(5, 3, dtype=torch.float64, generator=generator)
    decay = torch.polar(length, torch.arange(15.0, dtype=torch.float64).view(5, 3))
    readout = torch.randn(2, 5, 3, dtype=torch.complex128, generator=generator)
    skip = torch.randn(5, dtype=torch.float64, generator=generator)
    documents = ((torch.arange(150) // 40) + 1).expand(2, -1) if packed else None
    before, _ = recurrent_diagonal_state_space(x, decay, readout[:1], skip, documents=documents)
    turned = None if documents is None else (5 - documents).flip(1)
    after, _ = recurrent_diagonal_state_space(x.flip(1), decay, readout[1:], 0 * skip, documents=turned)
    after = torch.nn.functional.pad(after.flip(1)[:, 1:], (0, 0, 0, 1))
    if packed:
        after[:, [39, 79, 119]] = 0
    found, _ = chunk_diagonal_state_space(x, decay, readout, skip, documents=documents)
    assert_close(found, before + after, **EXACT)


@torch.no_grad()
def test_what_is_kept_in_eval_follows_the_parameters():
    layer, x = mixer(), torch.randn(1, 70, 32, dtype=torch.float64)
    first = layer(x)
    assert layer.state_space.made
    layer.state_space.A_log.add_(1)
    changed = layer(x)
    assert (changed - first).abs().max() > 1e-3
    with torch.enable_grad():
        assert_close(layer(x), changed)
    layer.state_space.A_log.data.sub_(1)
    layer.train()
    assert not layer.state_space.made
    assert_close(layer.eval()(x), first)


@pytest.mark.parametrize("fields, said", [({"state_size": 7}, "must be even"), ({"time_step_min": 0.0}, "between 0")])
def test_contradictions_are_refused(fields, said):
    with pytest.raises(Exception, match=said):
        ROW.tiny_config(**fields)


@torch.no_grad()
def test_what_is_kept_in_eval_follows_adapters_of_parameters():
    """Such an adapter stands in for a parameter during a call: neither its number nor its place changes."""
    model = Case(ROW, "ForCausalLM", fields={"layer_types": ["s4d"] * 2}).build(torch.float32)
    tokens = some_tokens()
    plain = model(tokens).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["state_space.A_log"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.normal_()
    assert (adapted(tokens).logits - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert_close(adapted(tokens).logits, plain)
    assert (adapted(tokens).logits - plain).abs().max() > 1e-3
