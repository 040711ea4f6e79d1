"""Reformer: equal to transformers', and what its paper says of it."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from originals import scaled_up
from torch.testing import assert_close
from transformers import ReformerConfig, ReformerModel, ReformerModelWithLMHead

from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.layers import reversible
from hf_arch.modeling.long_context.reformer.modeling_reformer import LSHAttention
from promises import EXACT, ROWS, some_tokens

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "feed_forward_size": 48, "is_decoder": True}
SIZES |= {"attention_head_size": 8, "attn_layers": ["local", "lsh", "lsh"], "hash_seed": 3, "num_hashes": 2}
SIZES |= {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 16, "max_position_embeddings": 128, "num_buckets": 6}
SIZES |= {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24], "initializer_range": 0.2}
CHOICES = {
    "several rounds": {},
    "factors of buckets, wide heads": {"num_buckets": [4, 6], "attention_head_size": 12, "num_hashes": 3},
    "learned positions, one round": {"axial_pos_embds": False, "num_hashes": 1, "hidden_act": "gelu"},
    "an encoder": {"is_decoder": False},
}
REFORMER = next(case for case in ROWS if case.row.name == "reformer")

pytestmark = pytest.mark.usefixtures("narrows_nowhere")


def theirs(head=ReformerModelWithLMHead, **choices):
    torch.manual_seed(0)
    return scaled_up(head(ReformerConfig(**(SIZES | choices)))).eval()


def with_their_rotations(model):
    """transformers draws them in the type of the model."""
    for module in model.modules():
        if isinstance(module, LSHAttention):
            torch.manual_seed(SIZES["hash_seed"])
            module.rotations = torch.randn_like(module.rotations)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CHOICES)
def test_sorted_equals_transformers(name, tmp_path):
    head = ReformerModelWithLMHead if CHOICES[name].get("is_decoder", True) else ReformerModel
    original = theirs(head, **CHOICES[name])
    original.save_pretrained(tmp_path)
    ours, original = with_their_rotations(convert(tmp_path, "reformer", bucketing="sorted").double()), original.double()
    for length in (128, 64, 41, 8):  # theirs pads what is no multiple of its chunks
        ids = some_tokens(length=length)
        assert_close(ours(ids, use_cache=False)[0], original(ids, use_cache=False)[0], **EXACT)
    padded, mask = some_tokens(length=64), torch.ones(2, 64, dtype=torch.long)
    mask[0, 59:] = 0
    told = {"attention_mask": mask, "use_cache": False}
    assert_close(ours(padded, **told)[0][mask > 0], original(padded, **told)[0][mask > 0], **EXACT)


def test_verify_compares_the_sorted_form(tmp_path):
    theirs(lsh_attn_chunk_length=32, local_attn_chunk_length=32).save_pretrained(tmp_path)
    convert(tmp_path, "reformer", bucketing="sorted", verify=True)
    ours = convert(tmp_path, "reformer")
    assert ours.config.bucketing == "ranked" and ours.config.use_cache
    assert not torch.equal(ours.model.layers[1].mixer.rotations, torch.zeros_like(ours.model.layers[1].mixer.rotations))


@torch.no_grad()
def test_one_bucket_of_one_block_is_full_attention_with_shared_keys():
    """Two buckets are the fewest: where one is left of a rotation, it holds all."""
    model = REFORMER.build(layer_types=["lsh_attention"] * 2, num_buckets=2, lsh_attn_chunk_length=70, num_hashes=1)
    mixer, hidden = model.model.layers[0].mixer, torch.randn(2, 70, 32, dtype=torch.float64)
    mixer.choose = lambda query: torch.zeros(*query.shape[:3], 1, dtype=torch.long)
    query, value = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (mixer.qk_proj(hidden), mixer.v_proj(hidden)))
    key = query * (query.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    others = torch.ones(70, 70).tril(-1).bool()
    others[0, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, others)
    assert_close(mixer(hidden), mixer.o_proj(expected.transpose(1, 2).flatten(2)), **EXACT)


@torch.no_grad()
def test_the_future_changes_the_past_where_tokens_are_sorted_and_only_there():
    ids = some_tokens(length=128)
    changed = ids.clone()
    changed[:, 100:] = (changed[:, 100:] + 7) % 96
    options = {"layer_types": ["lsh_attention"] * 2, "initializer_range": 0.5, "max_position_embeddings": 128}
    for bucketing, held in (("sorted", False), ("ranked", True)):
        model = REFORMER.build(**options, bucketing=bucketing)
        moved = (model(ids).logits - model(changed).logits)[:, :100].abs().max()
        assert (moved < 1e-9) == held


def gradients(model, tokens):
    model.zero_grad()
    torch.manual_seed(5)
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_layers_that_keep_all(dropout, monkeypatch):
    deep = {"num_hidden_layers": 6, "layer_types": None, "feed_forward_types": None}
    model = REFORMER.build(**deep, hidden_dropout=dropout, attention_dropout=dropout).train()
    forgetful = gradients(model, some_tokens())
    monkeypatch.setattr(
        reversible,
        "couple_and_forget",
        lambda streams, branch, before: ((streams[1], streams[0] + branch(streams[1])), before),
    )
    assert_close(forgetful, gradients(model, some_tokens()), **EXACT)


def test_what_a_hook_changes_between_layers_is_seen():
    model = REFORMER.build(num_hidden_layers=4, layer_types=None, feed_forward_types=None).train()
    model.model.layers[1].register_forward_hook(lambda layer, inputs, stream: stream * 1.5)
    found = gradients(model, some_tokens())
    model.eval()
    with torch.enable_grad():
        name, weight = "model.layers.0.mixer.o_proj.weight", model.model.layers[0].mixer.o_proj.weight
        step = torch.randn_like(weight)
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                weight.add_(sign * 1e-6 * step)
                losses.append(model(some_tokens(), labels=some_tokens()).loss)
                weight.sub_(sign * 1e-6 * step)
    assert_close((losses[0] - losses[1]) / 2e-6, (found[name] * step).sum(), atol=1e-6, rtol=1e-4)


def test_a_second_backward_is_refused():
    model = REFORMER.build(num_hidden_layers=4, layer_types=None, feed_forward_types=None).train()
    loss = model(some_tokens(), labels=some_tokens()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="go back once"):
        loss.backward()


def kept_bytes(depth):
    """What autograd keeps between forward and backward, but for weights and buckets."""
    model = REFORMER.build(num_hidden_layers=depth, layer_types=None, feed_forward_types=None).train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = model.model(some_tokens(), use_cache=False)  # noqa: F841, alive
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_memory_of_activations_does_not_grow_with_the_depth():
    assert kept_bytes(16) < 1.1 * kept_bytes(4)


def test_buckets_are_chosen_once():
    """A rounding error on the way back must not turn them."""
    model = REFORMER.build(dtype=torch.float32, num_hidden_layers=4, layer_types=None, feed_forward_types=None).train()
    chosen, choose = [], LSHAttention.choose
    for layer in model.model.layers[1::2]:
        layer.mixer.choose = lambda query, mixer=layer.mixer: chosen.append(mixer) or choose(mixer, query)
    model(some_tokens(), labels=some_tokens()).loss.backward()
    assert len(chosen) == 2


def test_rotations_are_saved_and_do_not_learn(tmp_path):
    model = REFORMER.build()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    rotations = model.model.layers[1].mixer.rotations
    assert torch.equal(loaded.model.layers[1].mixer.rotations, rotations) and rotations.std() > 0.5
    assert "rotations" not in dict(model.named_parameters())


def test_a_sorted_model_keeps_no_cache():
    model = REFORMER.build(bucketing="sorted")
    assert model(some_tokens()).past_key_values is None
    with pytest.raises(ValueError, match="use_cache=False"):
        model(some_tokens(), use_cache=True)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_buckets": 5}, "must be even"),
        ({"num_buckets": [4, 3]}, "must be even"),
        ({"num_hashes": 0}, "num_hashes is 0"),
        ({"lsh_attn_chunk_length": 0}, "lsh_attn_chunk_length is 0"),
        ({"direction": "bidirectional", "bucketing": "ranked"}, "an encoder takes 'sorted'"),
        ({"tie_word_embeddings": True}, "cannot be tied"),
        ({"axial_pos_shape": [4, 4]}, "no grid of two axes for 256"),
        ({"axial_pos_embds_dim": [4, 4]}, "make hidden_size 32"),
    ],
)
def test_configs_that_contradict_themselves(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        find("reformer").tiny_config(**fields)


@torch.no_grad()
def test_a_step_writes_where_the_state_stands_unless_someone_goes_back():
    model, tokens = REFORMER.build(), some_tokens(1)
    cache = model(tokens[:, :50], use_cache=True).past_key_values
    held = [layer.states["history_of_buckets"] for layer in cache.layers]
    model(tokens[:, 50:51], past_key_values=cache)
    assert all(layer.states["history_of_buckets"] is store for layer, store in zip(cache.layers, held, strict=True))
    for layer in cache.layers:
        layer.activate_past_recording()
    after = [model(tokens[:, n : n + 1], past_key_values=cache).logits for n in range(51, 55)]
    cache.crop(-3)
    again = [model(tokens[:, n : n + 1], past_key_values=cache).logits for n in range(52, 55)]
    assert_close(torch.cat(again), torch.cat(after[1:]), **EXACT)
    assert_close(torch.cat(after, dim=1), model(tokens[:, :55]).logits[:, 51:], **EXACT)
