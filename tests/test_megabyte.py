"""MegaByte answers as the paper's equations say, and as lucidrains' MEGABYTE-pytorch does where it follows them; the
global model runs once a patch.

The golden answers are of `MEGABYTE` 0.3.6 in float64 (`goldens/make_megabyte_lucidrains.py`).
"""

import doctest
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import find
from hf_arch.modeling.hierarchical.megabyte import modeling_megabyte
from promises import EXACT, Case, new_cache, some_tokens

GOLDEN = Path(__file__).parent / "goldens" / "megabyte_lucidrains.safetensors"
ROW = find("megabyte")
THREE = {"patch_sizes": [4, 3], "global_hidden_sizes": [16, 48], "num_hidden_layers": 4, "layer_levels": [2, 1, 0, 0]}


def under(prefix: str, tensors: dict) -> dict:
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def layer(theirs: dict, to: str) -> dict:
    key, value = theirs["0.to_kv.weight"].chunk(2)
    return {
        f"{to}.mixer.q_proj.weight": theirs["0.to_q.weight"],
        f"{to}.mixer.k_proj.weight": key,
        f"{to}.mixer.v_proj.weight": value,
        f"{to}.mixer.o_proj.weight": theirs["0.to_out.weight"],
        f"{to}.residual.norm.mixer.weight": theirs["0.norm.g"],
        f"{to}.residual.norm.feed_forward.weight": theirs["1.0.g"],
        **{f"{to}.feed_forward.up_proj.{end}": theirs[f"1.1.{end}"] for end in ("weight", "bias")},
        **{f"{to}.feed_forward.down_proj.{end}": theirs[f"1.4.{end}"] for end in ("weight", "bias")},
    }


def translated(theirs: dict, fields: dict) -> dict:
    """Their weights in our names. Their texts begin with nothing, ours with a token more, whose embedding, after what
    is learned to come before a text, is their first item of the first stage."""
    stages, found, number = len(fields["dim"]), {}, 0
    for stage, depth in enumerate(fields["depth"]):
        for i in range(depth):
            found |= layer(under(f"transformers.{stage}.layers.{i}", theirs), f"layers.{number}")
            number += 1
        level = stages - 1 - stage
        norm = f"resamplings.{level - 1}.answer_norm" if level else "norm"
        found[f"{norm}.weight"] = theirs[f"transformers.{stage}.norm.g"]
        if level:
            found[f"resamplings.{level - 1}.answer_proj.weight"] = theirs[f"maps.{stage}"]
            found[f"resamplings.{level - 1}.start"] = theirs[f"start_tokens.{stage + 1}"]
    start = theirs["start_tokens.0"]
    for level in reversed(range(stages - 1)):  # the last bytes of it are of the patch that ends last
        length = fields["max_seq_len"][stages - 1 - level]
        start, last = start.split((len(start) // length * (length - 1), len(start) // length))
        found[f"resamplings.{level}.before_text"], start = start.view(length - 1, -1), last
    tables = [theirs[f"token_embs.{level}{'.0' if level else ''}.weight"] for level in range(stages)]
    first = torch.cat((*(torch.zeros(table.shape[1]) for table in tables[:-1]), start))
    found["embed_tokens.weight"] = torch.cat((torch.cat(tables, dim=1), first[None]))
    return found


@pytest.mark.parametrize("name", ["two", "three"])
@torch.no_grad()
def test_equals_lucidrains(name):
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[name]
    golden, sizes, depths = under(name, load_file(GOLDEN)), fields["dim"], fields["depth"]
    model = ROW.load("Model")(
        ROW.load("Config")(
            vocab_size=fields["num_tokens"] + 1,
            hidden_size=sizes[-1],
            intermediate_size=4 * sizes[-1],
            num_attention_heads=sizes[-1] // 4,
            num_hidden_layers=sum(depths),
            layer_levels=[len(sizes) - 1 - stage for stage, depth in enumerate(depths) for _ in range(depth)],
            patch_sizes=fields["max_seq_len"][:0:-1],
            global_hidden_sizes=sizes[-2::-1],
            mlp_bias=True,
            norm_eps=0.0,
        )
    )
    model.load_state_dict(translated(under("weights", golden), fields))
    first = torch.full((2, 1), fields["num_tokens"])
    ids = torch.cat((first, golden["ids"][:, :-1]), dim=1)
    assert_close(model.double()(ids).last_hidden_state, golden["answers"], **EXACT)


def turned(x: torch.Tensor, place: int, turns: bool) -> torch.Tensor:
    """x [heads, dim] at a place: pairs as complex numbers, turned."""
    if not turns:
        return x
    half = x.shape[-1] // 2
    speed = (1.0 / 10000 ** (torch.arange(0, 2 * half, 2).float() / (2 * half))).double()
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(half).double(), place * speed)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def transformer(layers, items: list[torch.Tensor], turns: bool) -> torch.Tensor:
    """Of items [size] the last one's answer, token by token."""
    for layer in layers:
        mixer, norms = layer.mixer, layer.residual.norm
        heads = [[p(norms["mixer"](x)).view(-1, 8) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)] for x in items]
        keys = [turned(key, place, turns) for place, (_, key, _) in enumerate(heads)]
        answers = []
        for place, (query, _, _) in enumerate(heads):
            query = turned(query, place, turns)
            groups = [number // (len(query) // len(keys[0])) for number in range(len(query))]
            scores = torch.stack([(query * key[groups]).sum(-1) / 8**0.5 for key in keys[: place + 1]])
            weights = scores.softmax(0)
            read = sum(w[:, None] * value[groups] for w, (_, _, value) in zip(weights, heads, strict=False))
            answers.append(items[place] + mixer.o_proj(read.flatten()))
        items = [x + layer.feed_forward(norms["feed_forward"](x)) for x in answers]
    return items[-1]


@pytest.mark.parametrize("position_type", ["rope", "learned"])
@torch.no_grad()
def test_equals_the_papers_equations(position_type):
    """Of the text y after the first token x: every byte on its own, from all before it."""
    case, turns, patch = Case(ROW, "Model"), position_type == "rope", 4
    model = case.build(num_hidden_layers=3, layer_levels=[1, 0, 0], position_type=position_type)
    tokens, stage = some_tokens(1, 11)[0], model.resamplings[0]
    x, y = tokens[0], tokens[1:]
    local, of_patches = model.embed_tokens.weight.split((32, 16), dim=1)
    for written in range(len(y) + 1):
        number, place = divmod(written, patch)
        items = [torch.cat((stage.before_text.flatten(), of_patches[x]))]
        items += [of_patches[y[k * patch : (k + 1) * patch]].flatten() for k in range(number)]
        if not turns:
            places = model.inner_positions[0].embed_positions.weight
            items = [item + places[k] for k, item in enumerate(items)]
        answer = stage.answer_norm(transformer(model.layers[:1], items, turns))
        told = [stage.answer_proj(part) for part in answer.split(16)]
        inside = [stage.start, *local[y[number * patch : written]]]
        inside = [item + told[p] for p, item in enumerate(inside)]
        expected = model.norm(transformer(model.layers[1:], inside, turns=False))
        assert_close(model(tokens[None]).last_hidden_state[0, written], expected, **EXACT)


@torch.no_grad()
def test_levels_run_once_a_patch():
    model, tokens = Case(ROW, "ForCausalLM").build(**THREE), some_tokens(1, 40)
    runs, cache = {2: [], 1: [], 0: []}, new_cache(Case(ROW, "ForCausalLM").build(**THREE))
    for layer_idx, level in enumerate((2, 1, 0)):
        model.model.layers[layer_idx].register_forward_hook(lambda *told, level=level: runs[level].append(place))
    for place in range(40):
        model(tokens[:, place : place + 1], past_key_values=cache)
    assert runs == {level: [*range(0, 40, count)] for level, count in ((0, 1), (1, 4), (2, 12))}


@torch.no_grad()
def test_below_patches_a_memory_does_not_grow():
    model = Case(ROW, "ForCausalLM").build(**THREE)

    def held(length: int) -> list[int]:
        cache = model(some_tokens(1, length), use_cache=True).past_key_values
        of_patches = [state for layer in cache.layers[1:] for state in layer.states.values()]
        states = [state for name, state in cache.layers[0].states.items() if "stage" in name]
        return [state.untyped_storage().nbytes() for state in of_patches + states]

    assert held(24) == held(240)


@torch.no_grad()
def test_what_bytes_cost_is_linear():
    def operations(length: int) -> int:
        model = Case(ROW, "Model").build(torch.float32, layer_levels=[1, 0, 0], num_hidden_layers=3)
        fewer = Case(ROW, "Model").build(torch.float32, layer_levels=[1, 0], num_hidden_layers=2)
        found = []
        for each in (model, fewer):
            each.set_attn_implementation("eager")
            with FlopCounterMode(display=False) as counter:
                each(some_tokens(1, length), use_cache=False)
            found.append(counter.get_total_flops())
        return found[0] - found[1]

    assert operations(128) == 2 * operations(64)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patch_sizes": [1]}, "a patch has at least two items"),
        ({"patch_sizes": []}, "without patches is a Transformer"),
        ({"global_hidden_sizes": [48, 48]}, "global_hidden_sizes has 2 entries for 1 patch_sizes"),
        ({"global_hidden_sizes": [50]}, "50 of level 1 is not a multiple of its 4 bytes"),
        ({"global_hidden_sizes": [40]}, "40 of level 1 is not one of whole heads"),
        ({"layer_levels": [0, 1]}, "fall from the last level to 0"),
        ({"layer_levels": [0, 0]}, "No layer works at level 1"),
        ({"layer_types": ["patch_attention"] * 2}, "for these layer_levels, ..ragged_attention., .patch"),
        ({"tie_word_embeddings": True}, "bytes as all levels read them"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ROW.tiny_config(**fields)


def test_the_default_is_over_bytes():
    config = ROW.load("Config")()
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (384, 0, 1)  # ByT5's
    assert config.layer_levels == [1] * 16 + [0] * 8 and config.level_sizes == [512, 1024]
    nested = ROW.load("Config")(patch_sizes=[4, 8], num_hidden_layers=8)
    assert nested.layer_levels == [2] * 4 + [1] * 2 + [0] * 2 and nested.byte_sizes == [512, 256, 64]


def test_the_example_runs():
    failed, tried = doctest.testmod(modeling_megabyte)
    assert tried and not failed
