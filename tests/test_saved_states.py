"""What a model has read goes into a file and comes back; copies of it answer apart; nothing else is taken for it."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import Fp8QuantizedLayer, LinearAttentionLayer

import hf_arch
from hf_arch.modeling.layers.cache import growing
from promises import DECODERS, EXACT, ROWS, cache_layers_of

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=DECODERS, ids=str)
def decoder(request):
    return request.param.decoder()


def empty_cache(model, static: bool = False):
    made = StaticCache(config=model.config, max_cache_len=100) if static else growing(DynamicCache(config=model.config))
    return EncoderDecoderCache(made, DynamicCache()) if model.config.is_encoder_decoder else made


def read_text(model, tokens, static: bool = False):
    cache = empty_cache(model, static)
    model(tokens, past_key_values=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_text_is_read_once(decoder, tokens, tmp_path, static):
    expected = decoder(tokens).logits[:, 40:]
    cache = read_text(decoder, tokens[:, :40], static)
    hf_arch.save_state(cache, tmp_path / "state", decoder)
    pieces = tokens[:, 40:].split((1, 9, 20), dim=1)
    for _ in range(2):
        loaded = hf_arch.load_state(tmp_path / "state", decoder)
        assert type(loaded) is type(cache)
        assert [type(layer) for layer in cache_layers_of(loaded)] == [type(layer) for layer in cache_layers_of(cache)]
        logits = [decoder(piece, past_key_values=loaded).logits for piece in pieces]
        assert_close(torch.cat(logits, dim=1), expected, **EXACT)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@torch.no_grad()
def test_generation_goes_on_from_a_file_and_a_fork(decoder, tokens, tmp_path):
    whole = tokens[:1]
    expected = decoder.generate(whole, **GREEDY)
    hf_arch.save_state(read_text(decoder, whole[:, :50]), tmp_path / "state", decoder)
    cache = hf_arch.load_state(tmp_path / "state", decoder)
    for _ in range(2):
        assert torch.equal(decoder.generate(whole, past_key_values=hf_arch.fork(cache), **GREEDY), expected)
    question = whole[:, 50:]
    if not decoder.config.is_encoder_decoder:  # of an answer generate() wants all that was read
        told = {"attention_mask": torch.ones_like(whole), "past_key_values": hf_arch.fork(cache)}
        assert torch.equal(decoder.generate(question, **told, **GREEDY), expected[:, 50:])
    others = torch.cat((question, question.flip(1), question), dim=0)
    asked = torch.cat((whole[:, :50].expand(3, -1), others), dim=1)
    answers = decoder.generate(asked, past_key_values=hf_arch.fork(cache, 3), **GREEDY)
    assert torch.equal(answers, decoder.generate(asked, **GREEDY))
    assert cache.get_seq_length() == 50


@torch.no_grad()
def test_a_fork_is_a_snapshot_to_return_to(decoder, tokens):
    cache = read_text(decoder, tokens[:, :40])
    before = hf_arch.fork(cache)
    decoder(tokens[:, :7], past_key_values=cache)  # another way on
    expected = decoder(tokens).logits[:, 40:]
    assert_close(decoder(tokens[:, 40:], past_key_values=before).logits, expected, **EXACT)
    cache = read_text(decoder, tokens[:1, :40])
    several = hf_arch.fork(cache, 2)
    follow = torch.cat((tokens[:1, 40:], tokens[1:, 40:]))
    whole = torch.cat((tokens[:1, :40].expand(2, -1), follow), dim=1)
    assert_close(decoder(follow, past_key_values=several).logits, decoder(whole).logits[:, 40:], **EXACT)
    with pytest.raises(ValueError, match="fixed number of rows"):
        hf_arch.fork(StaticCache(config=decoder.config, max_cache_len=80), 2)


@torch.no_grad()
def test_a_padded_batch_is_kept(decoder, tokens, tmp_path):
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    cache = decoder(tokens[:, :50], attention_mask=mask[:, :50], use_cache=True).past_key_values
    hf_arch.save_state(cache, tmp_path / "state", decoder)
    loaded = hf_arch.load_state(tmp_path / "state", decoder)
    logits = decoder(tokens[:, 50:], attention_mask=mask, past_key_values=loaded).logits
    assert_close(logits, decoder(tokens, attention_mask=mask).logits[:, 50:], **EXACT)


@torch.no_grad()
def test_a_state_fits_a_model_of_another_dtype(row_case, tokens, tmp_path):
    everyone = {"num_experts_per_tok": 4} if row_case.config().has_experts else {}  # which rounding cannot change
    model = row_case.decoder(dtype=torch.float32, initializer_range=0.08, **everyone)
    expected = model(tokens).logits[:, 50:]
    hf_arch.save_state(read_text(model, tokens[:, :50]), tmp_path / "state", model)
    low = row_case.decoder(dtype=torch.float32, initializer_range=0.08, **everyone).bfloat16()
    cache = hf_arch.load_state(tmp_path / "state", low)
    for layer in cache_layers_of(cache):
        states = getattr(layer, "states", {}).values()
        assert {state.dtype for state in states if state.is_floating_point()} <= {torch.float32}
        assert layer.keys is None or layer.keys.dtype == torch.bfloat16
    logits = low(tokens[:, 50:], past_key_values=cache).logits
    assert (logits - expected).std() < 0.05 * expected.std()
    cache = hf_arch.load_state(tmp_path / "state", model, dtype=torch.float64, device="cpu")
    wide = model.double()(tokens[:, 50:], past_key_values=cache).logits
    assert_close(wide.float(), expected, atol=1e-4, rtol=1e-4)


def rewrite(path, tensors=None, **metadata):
    """The file again, with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        told = file.metadata() | metadata
        held = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})  # noqa: SIM118
    save_file(held, path, told)


@torch.no_grad()
def test_states_of_others_and_damaged_files_are_refused(row_case, tokens, tmp_path):
    model, path = row_case.decoder(), tmp_path / "state"
    with pytest.raises(ValueError, match="nothing to save"):
        hf_arch.save_state(empty_cache(model), path, model)
    with pytest.raises(FileNotFoundError, match="no file"):
        hf_arch.load_state(path, model)
    with pytest.raises(IsADirectoryError, match="name a file"):
        hf_arch.save_state(read_text(model, tokens), tmp_path, model)
    hf_arch.save_state(read_text(model, tokens), path, model)

    other = next(case for case in ROWS if case.row.family != row_case.row.family).decoder()
    with pytest.raises(ValueError, match=f"of a {model.config.model_type}, not of a {other.config.model_type}"):
        hf_arch.load_state(path, other)
    with pytest.raises(ValueError, match=f"norm_eps {model.config.norm_eps}, not 0.001"):
        hf_arch.load_state(path, row_case.decoder(norm_eps=1e-3))
    trained = row_case.decoder()
    next(weight for name, weight in trained.named_parameters() if "layers" in name).mul_(1.001)
    with pytest.raises(ValueError, match="other weights"):
        hf_arch.load_state(path, trained)

    good = path.read_bytes()
    rewrite(path, version="2")
    with pytest.raises(ValueError, match="install a newer one"):
        hf_arch.load_state(path, model)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(OSError, match="damaged"):
        hf_arch.load_state(path, model)
    turned = bytearray(good)
    turned[-100] ^= 1
    path.write_bytes(turned)
    with pytest.raises(OSError, match="checksum"):
        hf_arch.load_state(path, model)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no state"):
        hf_arch.load_state(path, model)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, message", [(LinearAttentionLayer, "conv_states"), (Fp8QuantizedLayer, "cannot be kept")]
)
def test_layers_that_a_file_would_not_know_whole_are_refused(tokens, tmp_path, kind, message):
    model = ROWS[0].build()
    cache = DynamicCache()
    model(tokens, past_key_values=cache)
    cache.layers[1] = kind()
    with pytest.raises(TypeError, match=message):
        hf_arch.save_state(cache, tmp_path / "state", model)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_failed_save_leaves_the_old_file(row_case, tokens, tmp_path, monkeypatch):
    model, path = row_case.decoder(), tmp_path / "state"
    hf_arch.save_state(read_text(model, tokens), path, model)
    good = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        hf_arch.save_state(read_text(model, tokens[:, :9]), path, model)
    assert path.read_bytes() == good and [found.name for found in tmp_path.iterdir()] == ["state"]
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["about"])["length"] == 70
