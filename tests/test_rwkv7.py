"""RWKV-7: equal to its definition, token by token, and what its paper says of it."""

import json

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from transformers import set_seed

from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.ops.delta_rule import chunk_delta_rule, recurrent_delta_rule
from hf_arch.modeling.ops.dispatch import on_packed_rows
from promises import some_tokens

SIZE, HEADS, LAYERS, INNER, VOCABULARY = 128, 2, 3, 192, 96
RANKS = {"w": 6, "a": 5, "v": 4, "g": 7}


def authors_tensors() -> dict[str, torch.Tensor]:
    """Random numbers in the layout of BlinkDL/rwkv-7-world, with the unused values of the first layer."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape, std=0.3, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

    def norm(name):
        return {f"{name}.weight": some(SIZE, mean=1.0), f"{name}.bias": some(SIZE)}

    tensors = {"emb.weight": some(VOCABULARY, SIZE), "head.weight": some(VOCABULARY, SIZE)}
    tensors |= norm("ln_out") | norm("blocks.0.ln0")
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        tensors |= norm(f"{block}ln1") | norm(f"{block}ln2") | norm(f"{block}att.ln_x")
        for name in "rwkvag":
            tensors[f"{block}att.x_{name}"] = some(1, 1, SIZE, mean=0.5)
        for name, rank in RANKS.items():
            tensors[f"{block}att.{name}1"] = some(SIZE, rank, std=0.2)
            tensors[f"{block}att.{name}2"] = some(rank, SIZE)
            if name != "g":
                tensors[f"{block}att.{name}0"] = some(1, 1, SIZE, std=1.0)
        for name in ("k_k", "k_a"):
            tensors[f"{block}att.{name}"] = some(1, 1, SIZE, mean=0.8)
        tensors[f"{block}att.r_k"] = some(HEADS, SIZE // HEADS)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{block}att.{name}.weight"] = some(SIZE, SIZE, std=0.15)
        tensors[f"{block}ffn.x_k"] = some(1, 1, SIZE, mean=0.5)
        tensors[f"{block}ffn.key.weight"] = some(INNER, SIZE, std=0.15)
        tensors[f"{block}ffn.value.weight"] = some(SIZE, INNER, std=0.15)
    return tensors


def by_definition(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of a text [length], one token at a time, each layer's memory S [heads, value, key] as in the paper."""

    def norm(x, name):
        return F.layer_norm(x, x.shape, tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)

    nothing = torch.zeros(SIZE, dtype=torch.float64)
    befores = [[nothing, nothing] for _ in range(LAYERS)]
    memories = [torch.zeros(HEADS, SIZE // HEADS, SIZE // HEADS, dtype=torch.float64) for _ in range(LAYERS)]
    logits = []
    for token in ids:
        x = norm(tensors["emb.weight"][token], "blocks.0.ln0")
        for layer in range(LAYERS):
            block = f"blocks.{layer}."
            p = {name.removeprefix(f"{block}att."): tensor.squeeze() for name, tensor in tensors.items()}
            normed = norm(x, f"{block}ln1")
            mixed = {n: normed + (befores[layer][0] - normed) * p[f"x_{n}"] for n in "rwkvag"}
            befores[layer][0] = normed
            r, k, v = p["receptance.weight"] @ mixed["r"], p["key.weight"] @ mixed["k"], p["value.weight"] @ mixed["v"]
            decay = torch.exp(
                -(torch.tensor(-0.5).double().exp())
                * torch.sigmoid(p["w0"] + torch.tanh(mixed["w"] @ p["w1"]) @ p["w2"])
            )
            rate = torch.sigmoid(p["a0"] + mixed["a"] @ p["a1"] @ p["a2"])
            gate = torch.sigmoid(mixed["g"] @ p["g1"]) @ p["g2"]
            if layer == 0:
                first = v
            else:
                v = v + (first - v) * torch.sigmoid(p["v0"] + mixed["v"] @ p["v1"] @ p["v2"])
            removal, k = k * p["k_k"], k * (1 + (rate - 1) * p["k_a"])
            answer = torch.empty(HEADS, SIZE // HEADS, dtype=torch.float64)
            own = torch.empty_like(answer)
            for head, part in enumerate(torch.arange(SIZE).chunk(HEADS)):
                kappa = removal[part] / removal[part].norm()
                S = memories[layer][head]
                S = S * decay[part] - torch.outer(S @ kappa, rate[part] * kappa) + torch.outer(v[part], k[part])
                memories[layer][head] = S
                answer[head], own[head] = S @ r[part], (r[part] * k[part] * p["r_k"][head]).sum() * v[part]
            spread = (answer.var(-1, keepdim=True, correction=0) + 64e-5).sqrt()
            answer = ((answer - answer.mean(-1, keepdim=True)) / spread).flatten() * p["ln_x.weight"] + p["ln_x.bias"]
            x = x + p["output.weight"] @ ((answer + own.flatten()) * gate)
            normed = norm(x, f"{block}ln2")
            mixture = normed + (befores[layer][1] - normed) * tensors[f"{block}ffn.x_k"].squeeze()
            befores[layer][1] = normed
            x = x + tensors[f"{block}ffn.value.weight"] @ F.relu(tensors[f"{block}ffn.key.weight"] @ mixture) ** 2
        logits.append(tensors["head.weight"] @ norm(x, "ln_out"))
    return torch.stack(logits)


@pytest.fixture(scope="module")
def tensors():
    return authors_tensors()


@torch.no_grad()
def test_the_authors_checkpoints_equal_the_definition(tensors, tmp_path):
    torch.save(tensors, tmp_path / "RWKV-x070-World.pth")
    model = convert(tmp_path, "rwkv7")
    config = model.config
    assert (config.num_attention_heads, config.decay_low_rank_dim, config.v_low_rank_dim) == (HEADS, 6, 4)
    ids = some_tokens(1, 75)
    expected = by_definition(tensors, ids[0])
    assert expected.std() > 0.5
    assert_close(model(ids).logits[0], expected, atol=1e-8, rtol=1e-8)


@torch.no_grad()
def test_the_layout_of_flash_linear_attention(tensors, tmp_path):
    (tmp_path / "authors").mkdir()
    torch.save(tensors, tmp_path / "authors" / "RWKV-x070-World.pth")
    model = convert(tmp_path / "authors", "rwkv7")
    names = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
    parts = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att": "attn", "ffn": "ffn"}
    projections = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
    found = {}
    for name, tensor in tensors.items():
        first, *rest = name.split(".")
        if first != "blocks":
            found[".".join((names[first], *rest))] = tensor
            continue
        layer, part, what, *kind = rest
        if part == "att" and len(what) == 2 and what[1] in "012" and what[0] in RANKS:
            if layer == "0" and what[0] == "v":
                continue
            kind = [
                f"{what[0]}_lora",
                "lora",
                *{"0": ("2", "bias"), "1": ("0", "weight"), "2": ("2", "weight")}[what[1]],
            ]
            tensor, what = tensor.squeeze().T, kind.pop(0)
        elif part == "att":
            what = projections.get(what, what)
            tensor = tensor if what.startswith("x_") else tensor.squeeze()
        elif part == "ffn":
            tensor = tensor.squeeze()
        found[".".join(("model.layers", layer, parts[part], what, *kind))] = tensor
    torch.save({name: tensor.contiguous() for name, tensor in found.items()}, tmp_path / "pytorch_model.bin")
    fields = {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "hidden_size": SIZE, "head_dim": 64}
    fields |= {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "intermediate_size": INNER, "norm_eps": 1e-5}
    fields |= {"decay_low_rank_dim": 6, "a_low_rank_dim": 5, "v_low_rank_dim": 4, "gate_low_rank_dim": 7}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"hidden_act": "sqrelu", "value_dim": [SIZE] * LAYERS}))
    ids = some_tokens(1, 20)
    assert_close(convert(tmp_path, "rwkv7")(ids).logits, model(ids).logits, atol=0, rtol=0)

    (tmp_path / "config.json").write_text(json.dumps(fields | {"head_dim": 128}))
    with pytest.raises(ValueError, match="head_dim"):
        convert(tmp_path, "rwkv7")


def test_checkpoints_that_do_not_fit(tensors, tmp_path):
    torch.save({name: x for name, x in tensors.items() if name != "blocks.1.att.x_g"}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"blocks\.1\.att\. lacks x_g"):
        convert(tmp_path, "rwkv7")
    torch.save({"something": torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError, match="config.json"):
        convert(tmp_path, "rwkv7")


def test_a_new_model_is_the_authors(tmp_path):
    """A layer answers with nothing, decays and mixtures grow along the channels, and ranks with the width."""
    set_seed(0)
    row = find("rwkv7")
    model = row.load("Model")(
        row.load("Config")(vocab_size=9, hidden_size=768, num_attention_heads=12, num_hidden_layers=3)
    )
    config, mixer = model.config, model.layers[1].mixer
    assert (config.decay_low_rank_dim, config.a_low_rank_dim, config.v_low_rank_dim) == (64, 64, 32)
    assert config.gate_low_rank_dim == 128
    for layer in model.layers:
        assert not layer.mixer.o_proj.weight.any() and not layer.feed_forward.down_proj.weight.any()
    assert_close(mixer.mix[0, 384], torch.tensor(1 - 0.5 ** (0.2 * 2 / 3)))
    assert_close(mixer.w.expand_proj.bias[767], torch.tensor(3.0))
    assert_close(mixer.w.expand_proj.bias[0], torch.tensor(-8.0))
    assert_close(mixer.head_norm.weight[0], torch.tensor((2 / 3) ** 0.7))
    assert model.layers[0].mixer.v is None and mixer.v is not None


@torch.no_grad()
def test_what_was_written_at_a_key_can_be_replaced():
    """The delta rule: with full rate and no decay, the value last written at a key is what is read there."""
    key = F.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 40, 1, 8)
    value = torch.randn(1, 40, 1, 5, dtype=torch.float64)
    output, _ = chunk_delta_rule(key, torch.zeros_like(key), key, value, -key, key)
    assert_close(output, value)


@torch.no_grad()
def test_the_kernel_of_flash_linear_attention_is_called_by_its_signature():
    """A stand-in with the arguments of fla.ops.rwkv7.chunk_rwkv7: one row, a state per document."""

    def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None):
        outputs, states = [], []
        for n, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
            part = [x[:, start:end] for x in (r * scale, w, k, v, a, b)]
            output, state = recurrent_delta_rule(
                *part, initial_state=initial_state[n : n + 1], output_final_state=output_final_state
            )
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 40, 3, 8, generator=generator, dtype=torch.float64) for _ in range(6)]
    tensors[1], tensors[4], tensors[5] = -tensors[1].abs(), 0.2 * tensors[4], 0.2 * tensors[5]
    documents = torch.tensor([[0] * 3 + [1] * 20 + [2] * 17, [1] * 30 + [0] * 10])
    state = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    options = {"documents": documents, "initial_state": state, "output_final_state": True}
    expected, expected_state = chunk_delta_rule(*tensors, **options)
    output, found_state = on_packed_rows(chunk_rwkv7, *tensors, **options)
    assert_close(output[documents > 0], expected[documents > 0])
    assert_close(found_state, expected_state)


def test_hidden_states_are_told_without_the_values_of_the_first_layer():
    model = find("rwkv7").load("Model")(find("rwkv7").tiny_config())
    outputs = model(some_tokens(), output_hidden_states=True)
    assert [state.shape[-1] for state in outputs.hidden_states] == [32] * 3


@pytest.mark.parametrize(
    "fields, message", [({"v_low_rank_dim": 0}, "v_low_rank_dim is 0"), ({"num_attention_heads": 3}, "not a multiple")]
)
def test_configs_that_contradict_themselves(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        find("rwkv7").tiny_config(**fields)
