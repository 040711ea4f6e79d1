"""Each way to tell positions, against its definition written slowly, or against an independent class."""

import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention, T5Config

from hf_arch import find
from hf_arch.modeling.layers import bias, positions
from hf_arch.modeling.skeleton import backbone
from promises import EXACT

SIZE, HEADS, DIM = 32, 4, 8
SCALED = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
ROPE = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_theta": 500.0, "factor": 4.0},
    "dynamic": {"rope_theta": 500.0, "factor": 4.0},
    "yarn": SCALED,
    "llama3": SCALED | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": SCALED | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
}


def config(**fields):
    return find("transformer").tiny_config(**({"num_key_value_heads": None} | fields))


def query_and_key(length):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, length, HEADS, DIM, dtype=torch.float64, generator=generator) for _ in range(2))


def told_to_layers(kind, position_ids, **fields):
    """What layers get as `position_embeddings`."""
    hidden_states = torch.zeros(1, position_ids.shape[-1], SIZE, dtype=torch.float64)
    module = kind(config(**fields)).double()
    return module(hidden_states, position_ids)[1]


def scores(rotation, query, key):
    query, key = rotation.rotate(query, key)
    return torch.einsum("bqhd,bkhd->bhqk", query, key)


def test_sinusoidal_is_the_papers():
    embedded, position_ids = torch.randn(2, 5, SIZE, dtype=torch.float64), torch.tensor([[0, 1, 2, 7, 3000]])
    found, told = positions.SinusoidalPositions(config())(embedded, position_ids)
    expected = embedded * math.sqrt(SIZE)
    for column, p in enumerate(position_ids[0].tolist()):
        for i in range(SIZE // 2):  # the paper interleaves sines and cosines, which is a matter of naming
            angle = p / 10000 ** (2 * i / SIZE)
            expected[:, column, i] += math.sin(angle)
            expected[:, column, SIZE // 2 + i] += math.cos(angle)
    torch.testing.assert_close(found, expected, **EXACT)
    assert told == positions.Plain()


def test_learned_adds_a_row_per_position():
    module = positions.LearnedPositions(config())
    embedded, position_ids = torch.randn(2, 3, SIZE), torch.tensor([[0, 255, 7]])
    found, _ = module(embedded, position_ids)
    for column, p in enumerate((0, 255, 7)):
        torch.testing.assert_close(found[:, column], embedded[:, column] + module.embed_positions.weight[p])


@torch.no_grad()
def test_learned_positions_end():
    model = find("transformer").load("ForCausalLM")(config(position_type="learned")).eval()
    model(torch.ones(1, 256, dtype=torch.long))
    with pytest.raises(ValueError, match="Position 256 is past the 256 learned positions"):
        model(torch.ones(1, 257, dtype=torch.long))
    cache = model(torch.ones(1, 256, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Position 256 is past the 256 learned positions"):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


def test_rope_turns_pairs_as_complex_numbers():
    position_ids = torch.tensor([[0, 1, 5, 100]])
    query, key = query_and_key(4)
    turned, _ = told_to_layers(positions.RotaryEmbedding, position_ids).rotate(query, key)
    for column, p in enumerate(position_ids[0].tolist()):
        for i in range(DIM // 2):
            pair = torch.complex(query[:, column, :, i], query[:, column, :, i + DIM // 2])
            pair = pair * complex(math.cos(p * 10000 ** (-2 * i / DIM)), math.sin(p * 10000 ** (-2 * i / DIM)))
            torch.testing.assert_close(turned[:, column, :, i], pair.real, atol=1e-5, rtol=1e-5)  # float32 rates
            torch.testing.assert_close(turned[:, column, :, i + DIM // 2], pair.imag, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rope_type", ROPE)
def test_rope_scalings_are_those_of_transformers(rope_type):
    fields = config(rope_parameters=ROPE[rope_type] | {"rope_type": rope_type}, max_position_embeddings=64)
    module = positions.RotaryEmbedding(fields)
    for length in (10, 64, 65, 200, 130, 20):  # past the trained length and back
        module(torch.zeros(1, length, SIZE), torch.arange(length)[None])
        if rope_type == "default":
            expected, factor = 500.0 ** -(torch.arange(0, DIM, 2) / DIM), 1.0
        else:
            reached = 200 if length == 130 else length  # dynamic keeps to the longest text until one is short again
            expected, factor = ROPE_INIT_FUNCTIONS[rope_type](fields, "cpu", seq_len=reached)
        torch.testing.assert_close(module.inv_freq, expected)
        assert module.attention_scaling == factor


def test_what_the_scalings_do():
    def rates(rope_type, length):
        fields = config(rope_parameters=ROPE[rope_type] | {"rope_type": rope_type}, max_position_embeddings=64)
        module = positions.RotaryEmbedding(fields)
        module(torch.zeros(1, length, SIZE), torch.arange(length)[None])
        return module.inv_freq.clone() / positions.RotaryEmbedding(config(rope_parameters=ROPE["default"])).inv_freq

    for length in (64, 256):
        torch.testing.assert_close(rates("linear", length), torch.full((4,), 0.25))
        for rope_type in ("yarn", "llama3"):  # the fast rotations stay, the slow ones are stretched by the factor
            assert rates(rope_type, length)[0] == 1
            torch.testing.assert_close(rates(rope_type, length)[-1], torch.tensor(0.25))
    assert (rates("dynamic", 64) == 1).all()
    assert (rates("dynamic", 256)[1:] < 1).all() and rates("dynamic", 256)[0] == 1
    torch.testing.assert_close(1 / rates("longrope", 64), torch.tensor(ROPE["longrope"]["short_factor"]))
    torch.testing.assert_close(1 / rates("longrope", 65), torch.tensor(ROPE["longrope"]["long_factor"]))


@pytest.mark.parametrize("kind", [positions.RotaryEmbedding, positions.XPosRotaryEmbedding])
def test_rotated_scores_depend_on_distance_alone(kind):
    query, key = query_and_key(50)
    near = scores(told_to_layers(kind, torch.arange(50)[None]), query, key)
    far = scores(told_to_layers(kind, torch.arange(50)[None] + 700), query, key)
    torch.testing.assert_close(far, near, rtol=1e-9, atol=1e-9)
    stretched = scores(told_to_layers(kind, 2 * torch.arange(50)[None]), query, key)
    assert (stretched - near).abs().max() > 1


def test_xpos_is_the_papers_equation():
    """Pair i: Re(q conj(k) e^(i theta n)) zeta^(n / 512), n the distance, zeta = (2i / dim + 0.4) / 1.4."""
    query, key = query_and_key(1)
    for distance in (0, 1, 100, 2000):
        rotation = told_to_layers(positions.XPosRotaryEmbedding, torch.tensor([[distance, 0]]))
        found = scores(rotation, query.expand(-1, 2, -1, -1), key.expand(-1, 2, -1, -1))[:, :, 0, 1]
        expected = 0
        for i in range(DIM // 2):
            pairs = (torch.complex(x[:, 0, :, i], x[:, 0, :, i + DIM // 2]) for x in (query, key))
            angle = distance * positions.RotaryEmbedding(config()).inv_freq[i].double()
            turned = next(pairs) * next(pairs).conj() * torch.polar(torch.ones_like(angle), angle)
            expected = expected + turned.real * ((2 * i / DIM + 0.4) / 1.4) ** (distance / 512)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_xpos_fades_with_the_distance_and_rope_does_not():
    def reach(kind, distance):
        """The largest score of a query at `distance` from a key, all pairs of length 1, whatever their angles."""
        ones = torch.ones(1, 2, HEADS, DIM, dtype=torch.float64) / math.sqrt(2)
        query, key = told_to_layers(kind, torch.tensor([[distance, 0]])).rotate(ones, ones)
        lengths = (x.unflatten(-1, (2, -1)).norm(dim=-2) for x in (query[:, 0], key[:, 1]))
        return (next(lengths) * next(lengths))[0, 0].sum()

    fading = [reach(positions.XPosRotaryEmbedding, distance).item() for distance in (0, 10, 300, 3000, 12000)]
    assert fading == sorted(fading, reverse=True)
    assert fading[0] == pytest.approx(4) and fading[-1] < 0.01
    for distance in (0, 3000):
        assert reach(positions.RotaryEmbedding, distance).item() == pytest.approx(4)


@pytest.mark.parametrize(
    "heads, expected",
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (8, [2**-i for i in range(1, 9)]),
        (16, [2 ** -(i / 2) for i in range(1, 17)]),
        (12, [2**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),  # the official code's
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_alibi_slopes_are_the_papers(heads, expected):
    slopes = positions.AlibiBias(config(hidden_size=heads * 8, num_attention_heads=heads)).slopes()
    assert slopes == pytest.approx(expected, rel=1e-12)


def bias_of(told, length, key_positions):
    """What is added to the scores of all pairs, [1, heads, queries, keys]."""

    def kernel(query, key, value, mask):
        unseen = torch.finfo(mask.dtype).min
        return torch.nn.functional.pad(mask, (0, length - mask.shape[-1]), value=unseen).transpose(1, 2), None

    nothing = torch.zeros(1, HEADS, length, 1, dtype=torch.float64)
    return told.attend(kernel, nothing, nothing, nothing, None, key_positions)[0].transpose(1, 2)


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_alibi_bias_is_the_papers(direction, straight):
    told = told_to_layers(positions.AlibiBias, torch.arange(9)[None], direction=direction)
    found = bias_of(told, 9, None if straight else torch.arange(9)[None])
    for head in range(HEADS):
        for i in range(9):
            for j in range(9):
                hidden = direction == "causal" and j > i
                expected = torch.finfo(torch.float64).min if hidden else -(2.0 ** (-2 * (head + 1))) * abs(i - j)
                assert found[0, head, i, j] == expected


@pytest.mark.parametrize("buckets, reach", [(32, 128), (16, 50), (8, 20), (32, 33)])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_t5_buckets_are_those_of_transformers(direction, buckets, reach):
    fields = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": reach}
    module = positions.T5Bias(config(direction=direction, **fields))
    distance = torch.arange(-300, 301 if direction == "bidirectional" else 1)
    expected = T5Attention._relative_position_bucket(distance, direction == "bidirectional", buckets, reach)
    assert torch.equal(module.bucket(distance), expected)


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@torch.no_grad()
def test_t5_bias_is_that_of_transformers(direction, straight):
    theirs = T5Attention(
        T5Config(num_heads=HEADS, d_model=SIZE, is_decoder=direction == "causal"), has_relative_attention_bias=True
    ).double()
    expected = theirs.compute_bias(400, 400)
    module = positions.T5Bias(config(direction=direction, max_position_embeddings=400)).double()
    module.relative_attention_bias.weight.copy_(theirs.relative_attention_bias.weight)
    _, told = module(torch.zeros(1, 400, SIZE, dtype=torch.float64), torch.arange(400)[None])
    found = bias_of(told, 400, None if straight else torch.arange(400)[None])
    seen = torch.ones(400, 400, dtype=torch.bool)
    seen = seen.tril() if direction == "causal" else seen
    assert torch.equal(found[:, :, seen], expected[:, :, seen])
    assert (found[:, :, ~seen] == torch.finfo(torch.float64).min).all()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("position_type", ["alibi", "t5"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_blocks_of_a_bias_equal_the_whole(direction, position_type, grad, monkeypatch):
    """Longer than a block, with padding at either end, and in the middle of a cached text; as a view of diagonals, and
    pair by pair."""
    torch.manual_seed(0)
    fields = {"direction": direction, "position_type": position_type, "initializer_range": 0.3}
    fields |= {"max_position_embeddings": 600}
    model = find("transformer").load("Model")(config(**fields)).double().eval()
    ids, mask = torch.randint(1, 96, (3, 90)), torch.ones(3, 90, dtype=torch.long)
    mask[1, :40], mask[2, 70:] = 0, 0

    def answers():
        told = {"attention_mask": mask, "use_cache": direction == "causal"}
        with torch.set_grad_enabled(grad):
            outputs, plain = model(ids, **told), model(ids).last_hidden_state
        if direction == "bidirectional":
            return [plain, outputs.last_hidden_state[mask.bool()]]
        more = {"attention_mask": torch.cat((mask, mask), dim=1), "past_key_values": outputs.past_key_values}
        with torch.set_grad_enabled(grad):
            after = model(ids, **more).last_hidden_state[mask.bool()]
        return [plain, outputs.last_hidden_state[mask.bool()], after]

    whole = answers()
    for changed in ({"BIAS_ROOM": 20_000, "QUERY_BLOCK": 32}, {"BIAS_ROOM": 1, "QUERY_BLOCK": 7}):
        for name, value in changed.items():
            monkeypatch.setattr(bias, name, value)
        for found, expected in zip(answers(), whole, strict=True):
            torch.testing.assert_close(found, expected, **EXACT)
    monkeypatch.setattr(backbone, "all_straight", lambda *args, **options: False)
    for found, expected in zip(answers(), whole, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_rotation_is_compiled_for_gradients_of_any_strides():
    weight = torch.eye(32, requires_grad=True)
    angle, values = torch.rand(1, 5, 1, 8), torch.rand(2, 4, 5, 6)

    def turned(x):
        keys = positions.rotated((x @ weight).unflatten(-1, (4, 8)), angle.cos(), angle.sin())
        return keys.permute(0, 2, 3, 1) @ values

    x = torch.rand(2, 5, 32)
    turned(x).square().sum().backward()
    expected, weight.grad = weight.grad, None
    torch._dynamo.reset()
    torch.compile(turned, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)
