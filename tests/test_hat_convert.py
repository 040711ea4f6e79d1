"""Checkpoints of the original HAT, and warm starts from text encoders."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from originals import BERT, scaled_up
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slow_hat import OURS, THEIRS, slow_original
from torch.testing import assert_close

from hf_arch.convert import convert
from promises import EXACT

GOLDEN = Path(__file__).parent / "goldens" / "hat_original.safetensors"
ROBERTA = BERT | {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-3}
ENCODERS = {
    "roberta": ("RobertaModel", ROBERTA),
    "roberta masked": ("RobertaForMaskedLM", ROBERTA),
    "bert": ("BertModel", BERT),
    "bert masked": ("BertForPreTraining", BERT),
}

ORIGINAL = {
    "model_type": "hierarchical-transformer",
    "architectures": ["HATForMaskedLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_sentences": 6,
    "max_sentence_length": 8,
    "max_position_embeddings": 10,
    "model_max_length": 48,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "encoder_layout": {
        "0": {"sentence_encoder": True, "document_encoder": False},
        "1": {"sentence_encoder": True, "document_encoder": True},
        "2": {"sentence_encoder": False, "document_encoder": True},
    },
}


def original_tensors() -> dict[str, torch.Tensor]:
    """As the published checkpoint names them, without the prefix."""
    draw, size, inner = torch.Generator().manual_seed(0), ORIGINAL["hidden_size"], ORIGINAL["intermediate_size"]

    def normed(*shape):
        return 0.3 * torch.randn(*shape, generator=draw)

    shapes = {"word": (61, size), "position": (8 + 2, size), "token_type": (1, size)}
    tensors = {f"embeddings.{name}_embeddings.weight": normed(*shape) for name, shape in shapes.items()}
    norms, linears = ["embeddings.LayerNorm"], {}
    table = normed(7, size)
    for number, layout in ORIGINAL["encoder_layout"].items():
        for kind in (kind for kind, there in layout.items() if there):
            if kind == "document_encoder":
                tensors[f"encoder.layer.{number}.position_embeddings.weight"] = table.clone()
            names = {part: f"encoder.layer.{number}.{kind}.{name}" for part, name in THEIRS.items()}
            norms += [names["norm"], names["last_norm"]]
            linears |= {names[part]: (size, size) for part in ("query", "key", "value", "output")}
            linears |= {names["up"]: (inner, size), names["down"]: (size, inner)}
    for name in norms:
        tensors |= {f"{name}.weight": 1 + normed(size), f"{name}.bias": normed(size)}
    for name, shape in linears.items():
        tensors |= {f"{name}.weight": normed(*shape), f"{name}.bias": normed(shape[0])}
    return tensors


def save_original(folder, **fields) -> dict[str, torch.Tensor]:
    tensors, size = original_tensors(), ORIGINAL["hidden_size"]
    saved = {f"hi_transformer.{name}": tensor for name, tensor in tensors.items()}
    saved["hi_transformer.embeddings.position_ids"] = torch.arange(2, 10).repeat(6)[None]
    bias = torch.randn(61)
    saved |= {"lm_head.dense.weight": torch.randn(size, size), "lm_head.dense.bias": torch.randn(size)}
    saved |= {"lm_head.layer_norm.weight": torch.randn(size), "lm_head.layer_norm.bias": torch.randn(size)}
    saved |= {"lm_head.bias": bias, "lm_head.decoder.bias": bias.clone()}
    saved["lm_head.decoder.weight"] = tensors["embeddings.word_embeddings.weight"].clone()
    save_file(saved, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(ORIGINAL | fields))
    return tensors


@torch.no_grad()
def test_the_original_layout(tmp_path):
    tensors = {name: tensor.double() for name, tensor in save_original(tmp_path).items()}
    model = convert(tmp_path, "hat").double()
    assert type(model).__name__ == "ArchHatForMaskedLM"
    assert model.config.layer_types == ["level_0", "level_0", "level_1", "level_1"]
    assert model.config.level_lengths == [8, 6] and model.config.tie_word_embeddings
    ids = torch.randint(2, 61, (1, 29), generator=torch.Generator().manual_seed(1))
    slow = slow_original(tensors, ORIGINAL, list(ids[0].split(8)))
    assert_close(model.model(ids)[0][0], torch.cat(slow), **EXACT)
    # as the original pads each segment; there a padded leader is a segment, too: here only real tokens are
    mask = torch.ones(1, 48, dtype=torch.long)
    mask[0, 5:8] = mask[0, 20:24] = mask[0, 40:] = 0
    starts = (torch.arange(48) % 8 == 0).long()[None]
    padded = torch.randint(2, 61, (1, 48), generator=torch.Generator().manual_seed(2))
    segments = [ids[real.bool()] for ids, real in zip(padded[0].split(8), mask[0].split(8), strict=True)]
    slow = slow_original(tensors, ORIGINAL, [segment for segment in segments if len(segment)])
    found = model.model(padded, attention_mask=mask, segment_starts=starts)
    assert_close(found[0][mask.bool()], torch.cat(slow), **EXACT)


@torch.no_grad()
def test_the_original_itself(tmp_path):
    """Its padding lies within segments: real tokens and starts of segments say the same."""
    golden = load_file(GOLDEN)
    ids, mask, answer = (golden.pop(name) for name in ("ids", "mask", "answer"))
    save_file(golden, tmp_path / "model.safetensors")
    with safe_open(GOLDEN, "pt") as file:
        (tmp_path / "config.json").write_text(file.metadata()["config"])
    model = convert(tmp_path, "hat").double()
    starts = (torch.arange(30) % 6 == 0).long().expand(2, -1)
    found = model(ids, attention_mask=mask, segment_starts=starts)
    assert_close(found[0][mask.bool()], answer[mask.bool()], **EXACT)
    assert found.segment_mask.tolist() == [[1] * 5, [1, 1, 1, 1, 0]]


def test_what_is_no_original(tmp_path):
    for fields, message in (
        ({"encoder_layout": None}, "no encoder_layout"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"architectures": ["HATForMultipleChoice"]}, "HATForMultipleChoice has no counterpart"),
    ):
        save_original(tmp_path, **fields)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path, "hat")
    save_original(tmp_path)
    with pytest.raises(ValueError, match="runs under transformers 4.38 only"):
        convert(tmp_path, "hat", verify=True)
    with pytest.raises(ValueError, match="segment_lengths cannot be chosen: the checkpoint decides it"):
        convert(tmp_path, "hat", segment_lengths=[4])


def text_encoder(name, folder):
    kind, fields = ENCODERS[name]
    peer = getattr(transformers, kind)
    theirs = scaled_up(peer(peer.config_class(**fields)))
    theirs.save_pretrained(folder)
    return theirs.double()


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_one_segment_is_the_text_encoder(name, tmp_path):
    theirs = text_encoder(name, tmp_path)
    ours = convert(tmp_path, "hat", segment_lengths=[]).double()
    assert ours.config.level_lengths == [64] and ours.config.layer_types == ["level_0"] * 2
    ids, mask = torch.randint(2, 61, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    ids = ids.masked_fill(mask == 0, theirs.config.pad_token_id)
    found, expected = ours(ids, attention_mask=mask)[0], theirs(ids, attention_mask=mask)[0]
    assert expected.dtype == torch.float64
    assert_close(found[mask.bool()], expected[mask.bool()], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_a_warm_start(name, tmp_path):
    theirs = text_encoder(name, tmp_path)
    layers = ["level_0", "level_1", "level_0", "level_1", "level_1"]
    ours = convert(tmp_path, "hat", head="Model", segment_lengths=[8], layer_types=layers, max_position_embeddings=40)
    ours = ours.double()
    first = 2 if "roberta" in name else 0
    table = theirs.base_model.embeddings.position_embeddings.weight[first:]
    assert_close(ours.embed_positions.levels[0].weight, table[:8])
    assert_close(ours.embed_positions.levels[1].weight, table[:5])
    state, weights = ours.state_dict(), theirs.base_model.state_dict()
    for layer, source in enumerate((0, 0, 1, 1, 1)):
        for part in OURS:
            for end in ("weight", "bias"):
                expected = weights[f"encoder.layer.{source}.{THEIRS[part]}.{end}"]
                assert_close(state[f"layers.{layer}.{OURS[part]}.{end}"], expected, rtol=0, atol=0)
    stores = {tensor.untyped_storage().data_ptr() for tensor in ours.parameters()}
    assert len(stores) == len(list(ours.parameters()))
    assert ours(torch.randint(2, 61, (1, 40)))[0].isfinite().all()
    with pytest.raises(ValueError, match="a warm start answers otherwise"):
        convert(tmp_path, "hat", segment_lengths=[8], verify=True)


def test_the_default_warm_start_is_the_published_layout(tmp_path):
    config = transformers.RobertaConfig(**ROBERTA | {"num_hidden_layers": 6, "max_position_embeddings": 132})
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    made = convert(tmp_path, "hat").config
    assert made.layer_types == ["level_0", "level_0", "level_0", "level_1"] * 2 and made.level_lengths == [128, 32]
    with pytest.raises(ValueError, match="hidden_size cannot be chosen.*leaves open segment_lengths, layer_types"):
        convert(tmp_path, "hat", hidden_size=8)
