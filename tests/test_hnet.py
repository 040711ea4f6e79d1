"""H-Net: equal to the authors' code, what its paper says of chunks, and its conversion from a file alone."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer

from hf_arch import byte_tokenizer, find
from hf_arch.convert import convert
from hf_arch.modeling.hierarchical.hnet import conversion_hnet
from hf_arch.modeling.hierarchical.hnet.modeling_hnet import DynamicChunking, ratio_losses
from hf_arch.modeling.ops.smoothing import recurrent_smoothing
from promises import EXACT, some_tokens

GOLDEN = Path(__file__).parent / "goldens" / "hnet_original.safetensors"
FIELDS = {
    "arch_layout": ["m1", ["m1t1", ["T1"], "t1"], "m1"],
    "d_model": [32, 32, 64],
    "d_intermediate": [0, 0, 96],
    "vocab_size": 24,
    "ssm_cfg": {"d_conv": 3, "expand": 2, "d_state": 4, "chunk_size": 16},
    "attn_cfg": {"num_heads": [2, 2, 2], "rotary_emb_dim": [8, 8, 16], "window_size": [3, 3, -1]},
    "tie_embeddings": False,
}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def weights(golden):
    return {name.removeprefix("weights."): code / 64 for name, code in golden.items() if name.startswith("weights.")}


@pytest.fixture
def theirs(weights, tmp_path):
    """A folder in the authors' layout."""
    torch.save(weights, tmp_path / "hnet.pt")
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


@torch.no_grad()
def test_equals_the_authors_code(theirs, golden):
    model = convert(theirs, "hnet").double()
    ids, mask = golden["ids"], golden["mask"]
    found = model(ids, attention_mask=mask.long())
    assert golden["logits"].std() > 0.1 and not found.logits.isnan().any()
    assert_close(found.logits[mask], golden["logits"][mask], **EXACT)
    alone = model(ids[:1], output_boundary_probabilities=True)
    for stage, probability in enumerate(alone.boundary_probabilities):
        assert_close(probability[0], golden[f"boundaries.{stage}"], **EXACT)
        assert 0 < (probability[0, 1:] > 0.5).sum() < len(probability[0]) - 1


def test_gradients_and_the_ratio_loss_equal_the_authors(theirs, golden):
    model, names = (
        convert(theirs, "hnet").double(),
        {
            "backbone.main_network.routing_module.k_proj_layer.weight": "model.resamplings.1.k_proj.weight",
            "backbone.residual_proj.bias": "model.resamplings.0.residual_proj.bias",
            "backbone.main_network.main_network.pad_dimension": "model.resamplings.1.pad_dimension",
        },
    )
    outputs = model(golden["ids"][:1], output_boundary_probabilities=True)
    losses, _ = ratio_losses(outputs.boundary_probabilities, [2.0, 3.0])
    assert_close(losses[0], golden["ratio_loss"], **EXACT)
    (outputs.logits.square().mean() + losses.mean()).backward()
    for name, ours in names.items():
        assert_close(model.get_parameter(ours).grad.float(), golden[f"gradients.{name}"], atol=1e-6, rtol=1e-5)


def test_a_file_alone_tells_all_but_the_heads(weights, theirs, monkeypatch):
    expected = convert(theirs, "hnet")
    (theirs / "config.json").unlink()
    monkeypatch.setattr(conversion_hnet, "HEADS", 2)
    monkeypatch.setattr(conversion_hnet, "WINDOW", 3)
    found = convert(theirs / "hnet.pt", "hnet")
    told = {"name_or_path": None, "_name_or_path": None, "intermediate_size": None, "inner_intermediate_sizes": None}
    assert found.config.to_dict() | told == expected.config.to_dict() | told
    assert found.config.inner_intermediate_sizes[1] == 128
    ids = some_tokens().remainder(24)
    assert torch.equal(found(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attn_cfg": FIELDS["attn_cfg"] | {"window_size": [3, 7, -1]}}, r"window_size differs.*\[3, 7\]"),
        ({"attn_cfg": FIELDS["attn_cfg"] | {"num_heads": [2, 4, 2]}}, "num_heads differs"),
        ({"arch_layout": ["m1", ["T1"], "m1"], "d_model": [32, 64], "d_intermediate": [0, 96]}
         | {"attn_cfg": {"num_heads": [2, 2], "rotary_emb_dim": [8, 16], "window_size": [3, -1]}}, "no place for"),
        ({"d_intermediate": [0, 0, 200]}, "shapes that differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_said(theirs, fields, message):
    (theirs / "config.json").write_text(json.dumps(FIELDS | fields))
    with pytest.raises(ValueError, match=message):
        convert(theirs, "hnet")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"inner_hidden_sizes": []}, "inner_hidden_sizes is empty"),
        ({"inner_hidden_sizes": [16]}, "they may grow, not shrink"),
        ({"inner_hidden_sizes": [50]}, "width 50 of a level is not a multiple"),
        ({"target_ratios": [3.0, 3.0]}, "target_ratios has 2 entries for 1 stages"),
        ({"target_ratios": [1.0]}, "more than one item"),
        ({"rotary_share": 0.6}, "no even number"),
        ({"state_head_dim": 24}, "not a multiple of state_head_dim 24"),
        ({"head_dim": 16}, "leave head_dim out"),
        ({"layer_types": ["causal_window_attention"] * 3, "sliding_window": None}, "sliding_window of at least 2"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4}
          | {"long_factor": [1.0] * 4}}, "heads of one width"),
    ],
)  # fmt: skip
def test_contradictory_configs_fail(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        find("hnet").tiny_config(**fields)


def tiny(**fields):
    torch.manual_seed(0)
    return find("hnet").load("ForCausalLM")(find("hnet").tiny_config("ForCausalLM", **fields))


def test_a_model_begins_as_the_authors_do():
    model = tiny(hidden_size=64, inner_hidden_sizes=[96])
    chunking = model.model.resamplings[0]
    assert torch.equal(chunking.q_proj.weight, torch.eye(64)) and torch.equal(chunking.k_proj.weight, torch.eye(64))
    assert not chunking.residual_proj.weight.any() and not chunking.pad_dimension.any()
    assert model.model.embed_tokens.weight[1:].std().item() == pytest.approx(1.0, rel=0.1)
    first, middle = model.model.layers[0].mixer.out_proj.weight, model.model.layers[1].mixer.o_proj.weight
    assert first.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.1)  # two parts add to the stream of tokens
    assert middle.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1)  # and two more to that of chunks


def test_the_ratio_loss_is_added_in_training_and_is_the_same_in_pieces():
    model, tokens = tiny(hidden_dropout=0.0).double().train(), some_tokens(2)
    whole = model(tokens, labels=tokens)
    plain = model.eval()(tokens, labels=tokens)
    assert_close(whole.loss - plain.loss, 0.03 * whole.ratio_loss, **EXACT)
    assert plain.ratio_loss is None
    model.train()
    mask = torch.ones_like(tokens)
    mask[1, :30] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    padded = model(tokens, attention_mask=mask, labels=labels)
    alone = [model(row[None], labels=row[None]).ratio_loss for row in (tokens[0], tokens[1, 30:])]
    assert_close(padded.ratio_loss, (69 * alone[0] + 39 * alone[1]) / 108, **EXACT)
    positions = torch.cat((torch.arange(70), torch.arange(40)))[None]
    packed = torch.cat((tokens[:1], tokens[1:, 30:]), dim=1)
    assert_close(model(packed, position_ids=positions, labels=packed).ratio_loss, padded.ratio_loss, **EXACT)


def test_the_ratio_loss_is_least_at_its_target():
    shares = torch.arange(1, 100) / 100
    rows = torch.stack([(torch.arange(1000) < 1000 * share).double() for share in shares])
    losses, _ = ratio_losses((rows,), [5.0])
    assert shares[losses.argmin()] == pytest.approx(0.2) and losses.min() == pytest.approx(1.0)


@torch.no_grad()
def test_residuals_and_smoothing_stay_wide_in_a_narrow_model(tmp_path):
    model = tiny().eval()
    model.save_pretrained(tmp_path)
    low = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    of_residuals = {name for name, weight in low.named_parameters() if weight.dtype == torch.float32}
    assert of_residuals == {f"model.resamplings.0.residual_proj.{part}" for part in ("weight", "bias")}
    outputs = low(some_tokens(), output_hidden_states=True, use_cache=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert {outputs.past_key_values.layers[0].read(f"memory_stage_0_{name}").dtype for name in ("answer", "query")} == {
        torch.float32
    }
    assert outputs.hidden_states[1].dtype == torch.float32


def test_tokens_are_the_bytes_of_a_text(tmp_path):
    text = "H\u00e9llo, \u4e16\u754c \u00fe\u00ff  \n\t\U0001f642"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each(text)["input_ids"]
        assert ids == [254, *text.encode()] and each.decode(ids, skip_special_tokens=True) == text
        assert each(["ab", "c"], padding=True)["input_ids"] == [[254, 97, 98], [255, 254, 99]]
        assert len(each) == find("hnet").load("Config")().vocab_size and each.eos_token_id == 255


@torch.no_grad()
def test_smoothing_is_the_average_of_the_paper():
    torch.manual_seed(0)
    value, rate, state = torch.randn(2, 9, 5).double(), torch.rand(2, 9).double(), torch.randn(2, 5).double()
    expected, held = [], state
    for t in range(9):
        held = rate[:, t, None] * value[:, t] + (1 - rate[:, t, None]) * held
        expected.append(held)
    output, last = recurrent_smoothing(value, rate, initial_state=state, output_final_state=True)
    assert_close(output, torch.stack(expected, dim=1), **EXACT)
    assert_close(last, held, **EXACT)


def test_chunks_begin_where_neighbours_differ():
    chunking = DynamicChunking(find("hnet").tiny_config(), 0).double()
    chunking.init_parameters(0.02)
    same, other = torch.ones(32).double(), torch.ones(32).double()
    other[:20] = -1
    stream = torch.stack((same, same, other, other, other, same))[None]
    level = type("Level", (), {"place": torch.arange(6)[None], "real": None})
    fires, (probability, _) = chunking.fire(stream, level, None)
    assert fires.tolist() == [[True, False, True, False, False, True]]
    assert probability.tolist() == [pytest.approx([1, 0, 0.625, 0, 0, 0.625])]
