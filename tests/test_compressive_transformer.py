"""Compressive Transformer answers as its paper says, segment by segment, and as compressive-transformer-pytorch does
where that follows the paper (`goldens/make_compressive_original.py`)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch.testing import assert_close

from hf_arch import find
from hf_arch.modeling.ops.compressed_memory import Rate, slots_of_rows
from hf_arch.modeling.ops.segment_attention import block_segment_attention, dense_segment_attention
from hf_arch.modeling.ops.segment_rows import Window, find_rows

GOLDEN = Path(__file__).parent / "goldens" / "compressive_original.safetensors"
EXACT = {"atol": 1e-8, "rtol": 1e-8}
KINDS = ("mean_pooling", "max_pooling", "convolution", "dilated_convolution", "most_used")
LOSS = {"output_compression_loss": True}


def compressive(**fields):
    """A small model in float64."""
    row = find("compressive_transformer")
    torch.manual_seed(0)
    model = row.load("ForCausalLM")(row.tiny_config("ForCausalLM", **({"initializer_range": 0.2} | fields)))
    return model.double().eval()


def compressed(mixer, tokens, usage, config):
    """f_c of the paper: [tokens, size] -> [tokens / rate, size]."""
    rate, kind, groups = config.compression_rate, config.compression, tokens.split(config.compression_rate)
    if kind == "mean_pooling":
        return torch.stack([sum(group) / rate for group in groups])
    if kind == "max_pooling":
        return torch.stack([group.max(0).values for group in groups])
    if kind == "most_used":
        return torch.stack(
            [tokens[i] for i in sorted(sorted(range(len(tokens)), key=lambda i: -usage[i])[: len(groups)])]
        )
    kernels = [mixer.compression.kernel] if kind == "convolution" else mixer.compression.kernels
    slots = []
    for group in groups:
        x = group.T[None]
        for number, kernel in enumerate(kernels):
            x = F.relu(x) if number else x
            weight = kernel.weight.unflatten(1, (-1, tokens.shape[1])).transpose(1, 2)
            x = F.conv1d(x, weight, kernel.bias, dilation=1 if kind == "convolution" else 2**number)
        slots.append(x[0, :, 0])
    return torch.stack(slots)


def by_content(mixer, tokens, past):
    """attn(h, m) of algorithm 2: what each head answers, and the attention that each of `past` gets."""
    query, key, value = (mixer.project(name, x) for name, x in (("q_proj", tokens), ("k_proj", past), ("v_proj", past)))
    weights = (torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value), weights.mean((0, 1))


def attention(mixer, tokens, past):
    """One token at a time, over all before it as if they were one text."""
    keys, outputs = torch.cat((past, tokens)), []
    relative, biases = mixer.relative(), mixer.biases
    for i, token in enumerate(tokens):
        seen = keys[: len(past) + i + 1]
        query, key, value = (
            mixer.project(name, x) for name, x in (("q_proj", token), ("k_proj", seen), ("v_proj", seen))
        )
        by_distance = ((query + biases.distance_bias) * relative[: len(seen)].flip(0)).sum(-1)
        scores = ((query + biases.content_bias) * key).sum(-1) + by_distance
        weights = (scores / query.shape[-1] ** 0.5).softmax(0)
        outputs.append((weights[..., None] * value).sum(0).flatten())
    return mixer.o_proj(torch.stack(outputs))


@torch.no_grad()
def by_the_paper(model, ids):
    """Algorithms 1 and 2 for one text: its logits, and the squares of what each layer loses, token by token."""
    config, layers = model.config, model.model.layers
    empty = torch.zeros(0, config.hidden_size, dtype=torch.float64)
    memory, slots, logits = [empty] * len(layers), [empty] * len(layers), []
    lost = [[] for _ in layers]
    for piece in ids.split(config.segment_length):
        h = model.model.embed_tokens(piece) * config.hidden_size**0.5
        for i, layer in enumerate(layers):
            answer = attention(layer.mixer, h, torch.cat((slots[i], memory[i])))
            old = memory[i][: max(0, len(memory[i]) + config.segment_length - config.memory_length)]
            memory[i] = torch.cat((memory[i], h))[-config.memory_length :]
            if len(old):
                expected, usage = by_content(layer.mixer, h, old)
                new = compressed(layer.mixer, old, usage, config)
                lost[i] += (expected - by_content(layer.mixer, h, new)[0]).square().mean((1, 2)).tolist()
                slots[i] = torch.cat((slots[i], new))[-config.compressed_memory_length :]
            h = layer.residual.norm["mixer"](h + answer)
            h = layer.residual.norm["feed_forward"](h + layer.feed_forward(h))
        logits.append(model.lm_head(h))
    return torch.cat(logits), lost


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_the_paper(kind, tokens):
    model = compressive(compression=kind, memory_length=16 if kind == "most_used" else 12)
    found = model(tokens, **LOSS)
    each = [by_the_paper(model, row) for row in tokens]
    assert_close(found.logits, torch.stack([logits for logits, _ in each]), **EXACT)
    expected = sum(sum(row[layer][t] for _, row in each for t in range(len(row[layer]))) for layer in range(2))
    count = sum(len(row[0]) for _, row in each)
    assert_close(found.compression_loss.item(), expected / count, **EXACT)
    assert model(tokens).compression_loss is None  # in evaluation, only where it is asked for


def of_original(golden):
    """The golden's model as ours: it scales no embeddings, and its layers share what positions are."""
    told = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "segment_length": 8, "vocab_size": 40}
    told |= {"memory_length": 8, "compressed_memory_length": 6, "residual_type": "pre_norm", "hidden_act": "gelu"}
    model = compressive(attention_bias=True, mlp_bias=True, pad_token_id=None, **told)
    theirs = {name.removeprefix("weights."): x.double() for name, x in golden.items()}
    state = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    state["model.embed_tokens.weight"] = theirs["token_emb.weight"] / 4
    for name in ("weight", "bias"):
        state[f"lm_head.{name}"] = theirs[f"to_logits.1.{name}"]
    for i in range(2):
        ours, attn, ff = f"model.layers.{i}.", f"attn_layers.{i}.fn.", f"ff_layers.{i}.fn."
        state[f"{ours}mixer.relative.r_proj.weight"] = theirs["relative"]
        state[f"{ours}mixer.q_proj.weight"] = theirs[f"{attn}fn.to_q.weight"]
        for name, part in zip("kv", theirs[f"{attn}fn.to_kv.weight"].chunk(2), strict=True):
            state[f"{ours}mixer.{name}_proj.weight"] = part
        kernel = theirs[f"{attn}fn.compress_mem_fn.conv.weight"].transpose(1, 2).flatten(1)
        state[f"{ours}mixer.compression.kernel.weight"] = kernel
        state[f"{ours}mixer.compression.kernel.bias"] = theirs[f"{attn}fn.compress_mem_fn.conv.bias"]
        for name in ("weight", "bias"):
            state[f"{ours}residual.norm.mixer.{name}"] = theirs[f"{attn}norm.{name}"]
            state[f"{ours}residual.norm.feed_forward.{name}"] = theirs[f"{ff}norm.{name}"]
            state[f"{ours}mixer.o_proj.{name}"] = theirs[f"{attn}fn.to_out.{name}"]
            state[f"{ours}feed_forward.up_proj.{name}"] = theirs[f"{ff}fn.w1.{name}"]
            state[f"{ours}feed_forward.down_proj.{name}"] = theirs[f"{ff}fn.w2.{name}"]
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_equals_compressive_transformer_pytorch():
    golden = load_file(GOLDEN)
    found = of_original(golden)(golden["ids"], **LOSS)
    assert_close(found.logits[:, 7::8], golden["logits"], **EXACT)
    assert_close(found.compression_loss, golden["loss"], **EXACT)


def like_transformer_xl(model, **fields):
    """A Transformer-XL with the weights of `model`."""
    row = find("transformer_xl")
    xl = row.load("ForCausalLM")(row.tiny_config("ForCausalLM", **fields)).double().eval()
    xl.load_state_dict({name: x for name, x in model.state_dict().items() if ".compression." not in name})
    return xl


@torch.no_grad()
def test_means_of_one_token_are_a_longer_memory(tokens):
    model = compressive(compression="mean_pooling", compression_rate=1, compressed_memory_length=17)
    xl = like_transformer_xl(model, segment_length=8, memory_length=12 + 17)
    found, expected = (each(tokens, output_hidden_states=True).hidden_states for each in (model, xl))
    for layer, other in zip(found, expected, strict=True):
        assert_close(layer, other, **EXACT)


@torch.no_grad()
def test_a_memory_of_the_whole_text_is_one_long_segment(tokens):
    model = compressive(memory_length=64)
    assert_close(model(tokens).logits, like_transformer_xl(model, segment_length=70)(tokens).logits, **EXACT)


def gradients(model, tokens, scale=1.0, **told):
    model.zero_grad()
    (scale * model(tokens, labels=tokens, **told).loss).backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("kind", ["convolution", "dilated_convolution"])
def test_each_loss_trains_its_own(kind, tokens):
    """However the whole is scaled."""
    model = compressive(compression=kind).train()
    both, without = gradients(model, tokens), gradients(model, tokens, output_compression_loss=False)
    scaled = gradients(model, tokens, scale=3.0, num_items_in_batch=2 * 69 * 2)
    model.config.compression_loss_coef = 0.5
    halved = gradients(model, tokens)
    for name in both:
        if ".compression." in name:
            assert both[name].any() and not without[name].any()
            assert_close(halved[name], both[name] / 2, **EXACT)
            assert_close(scaled[name], both[name] * 1.5, **EXACT)
        else:
            assert_close(both[name], without[name], **EXACT)


def test_the_loss_has_the_gradient_of_what_it_says(tokens):
    """By differences, of a bias."""
    model = compressive().train()
    bias = model.model.layers[1].mixer.compression.kernel.bias
    found = gradients(model, tokens)["model.layers.1.mixer.compression.kernel.bias"][3].item()
    losses = []
    with torch.no_grad():
        for change in (1e-5, -2e-5):
            bias[3] += change
            losses.append(model(tokens, labels=tokens).compression_loss)
    asked = (70 - 8) / 69  # a mean over tokens before which something leaves; in the loss, over those that are named
    assert found == pytest.approx(asked * (losses[0] - losses[1]).item() / 2e-5, rel=1e-5)


def test_the_compression_learns(tokens):
    model = compressive().train()
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(12):
        outputs = model(tokens, labels=tokens)
        losses.append(outputs.compression_loss.item())
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_segment_that_an_earlier_call_began_is_left_out_of_the_loss(tokens):
    """A stream in whole segments adds up to the same."""
    model = compressive()
    whole = model(tokens, **LOSS).compression_loss
    cache, sums, counts = None, 0.0, 0
    for piece in tokens.split((24, 40, 6), dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True, **LOSS)
        count = piece.shape[1] - (8 if cache is None else 0)  # with the first segment, nothing leaves
        cache, sums, counts = outputs.past_key_values, sums + count * outputs.compression_loss, counts + count
    assert_close(sums / counts, whole, **EXACT)


@torch.no_grad()
def test_the_state_does_not_grow(tokens):
    for kind in ("convolution", "most_used"):
        model = compressive(compression=kind, memory_length=16)
        sizes = [
            {name: x.shape for name, x in model(tokens[:, :n], use_cache=True).past_key_values.layers[0].states.items()}
            for n in (5, 30, 70)
        ]
        assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("length", [17, 40, 70])
@pytest.mark.parametrize("still", [False, True])
def test_blocks_equal_the_definition(length, still):
    """Also their gradients."""
    window, generator = Window(8, 12), torch.Generator().manual_seed(length)
    rate = Rate(window, 5, 4, 4)
    shapes = [(2, length, 3, 4)] * 6 + [(25, 3, 4)] + [(2, -(-length // 8) * 2, 3, 4)] * 2
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    *tensors, held_key, held_value, relative, slot_key, slot_value = made
    slots = slots_of_rows((slot_key, slot_value), find_rows(tensors[0], None, None, window), None, rate)
    told = {"slots": slots, "still": (held_key, held_value) if still else None}
    used, found = made if still else [*tensors, relative, slot_key, slot_value], []
    for form in (dense_segment_attention, block_segment_attention):
        output, _ = form(*tensors, relative, window, **told)
        found.append((output, *torch.autograd.grad(output.pow(3).sum(), used)))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"compression_rate": 3}, "segment_length 8 is not a multiple of compression_rate 3"),
        ({"memory_length": 14}, "memory_length 14 is not a multiple of compression_rate 4"),
        ({"memory_length": 4}, "memory_length 4 is less than segment_length 8"),
        ({"compressed_memory_length": 0}, "compressed_memory_length is 0"),
        ({"compression": "most_used"}, "memory_length 12 is not a multiple of segment_length 8"),
        ({"compression": "dilated_convolution", "compression_rate": 1}, "compression_rate 1 is no power of 2"),
        ({"compression": "zip"}, "compression"),
        ({"compression_loss_coef": -1.0}, "must not be negative"),
    ],
)
def test_contradictory_configs_fail(fields, said):
    with pytest.raises(StrictDataclassError, match=said):
        compressive(**fields)
