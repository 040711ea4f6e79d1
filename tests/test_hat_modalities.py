"""Images and videos among the segments of HAT: what the model makes of them, and what it refuses."""

import inspect

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import get_peft_model
from slow_hat import slow_hat
from torch.testing import assert_close

import hf_arch
from hf_arch import find
from hf_arch.modeling.layers.modalities import MODALITIES, patches_of
from promises import EXACT, Case, some_tokens

ROW = find("hat")
IMAGE, VIDEO, LEADER, PATCHES = 94, 95, 3, 4
PIXELS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_size": 4, "patch_size": 2, "num_channels": 2}
SHAPES = {
    "two_levels": {},
    "three_levels": {"segment_lengths": [6, 4], "num_hidden_layers": 5, "type_vocab_size": 4}
    | {"layer_types": ["level_0", "level_1", "down_1", "level_2", "level_2"]},
    "han": {"layer_types": ["gru_0", "pool_0", "gru_1", "pool_1", "gru_0"], "num_hidden_layers": 5}
    | {"feed_forward_types": ["none"] * 5, "position_type": "none", "residual_type": "replaced"}
    | {"embedding_norm": False, "document_pooling": "leader"},
}


def build(head: str = "Model", shape: str = "two_levels", **fields):
    return Case(ROW, head).build(**PIXELS | SHAPES[shape] | fields)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def row_of(*segments) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and starts: a number is as many tokens of text, "image" one, a list as many frames of a video."""
    ids, starts = [], []
    for number, segment in enumerate(segments):
        if isinstance(segment, int):
            ids += [LEADER, *some_tokens(1, segment, seed=number)[0].clamp(max=90).tolist()]
            starts += [1] + [0] * segment
        else:
            frames = [IMAGE] if segment == "image" else [VIDEO] * segment[0]
            for place, token in enumerate(frames):
                ids += [LEADER] + [token] * PATCHES
                starts += [2 if token == VIDEO and not place else 1] + [0] * PATCHES
    return torch.tensor(ids), torch.tensor(starts)


def some_pixels(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TEXTS = [row_of(3, "image", [3], 4, "image"), row_of(5, 2), row_of([2], "image", [1])]


def batch_of(rows, padding=lambda number: (0, 0), fill: int = IMAGE) -> dict[str, torch.Tensor]:
    """Rows side by side, with as many columns of padding before and after; what padding holds says nothing."""
    longest = max(len(ids) + sum(padding(number)) for number, (ids, _) in enumerate(rows))
    told = {name: torch.full((len(rows), longest), fill) for name in ("input_ids", "segment_starts")}
    told["attention_mask"] = torch.zeros_like(told["input_ids"])
    for number, (ids, starts) in enumerate(rows):
        part = slice(padding(number)[0], padding(number)[0] + len(ids))
        for name, values in zip(told, (ids, starts, torch.ones_like(ids)), strict=True):
            told[name][number, part] = values
    return told


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_its_definition(shape):
    """In a batch with padding, whose second row is text alone; videos are of different lengths."""
    model, images, frames = build(shape=shape), some_pixels(3), some_pixels(6)
    told = batch_of(TEXTS, lambda number: (number, 2 * number))
    found = model(**told, pixel_values=images, pixel_values_videos=frames).last_hidden_state
    shares = [(images[:2], frames[:3]), ((), ()), (images[2:], frames[3:])]
    weights = weights_of(model)
    if "embed_segments.weight" in weights:  # all are of kind 0
        weights["embed_tokens.weight"] = weights["embed_tokens.weight"] + weights["embed_segments.weight"][0]
        weights["embed_modalities.patch_proj.bias"] = (
            weights["embed_modalities.patch_proj.bias"] + weights["embed_segments.weight"][0]
        )
    for number, ((ids, starts), pixels) in enumerate(zip(TEXTS, shares, strict=True)):
        expected = slow_hat(weights, model.config, ids, starts.tolist(), *pixels)
        assert_close(found[number, number : number + len(ids)], expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_packing_and_the_batch_change_nothing(shape):
    model, images, frames = build(shape=shape), some_pixels(3), some_pixels(6)
    shares = [(images[:2], frames[:3]), (None, None), (images[2:], frames[3:])]
    alone = [
        model(ids[None], segment_starts=starts[None], pixel_values=some, pixel_values_videos=others)
        for (ids, starts), (some, others) in zip(TEXTS, shares, strict=True)
    ]
    pixels = {"pixel_values": images, "pixel_values_videos": frames}
    inside = torch.ones(1, sum(len(ids) for ids, _ in TEXTS) + 3, dtype=torch.long)
    inside[0, [5, 6, 40]] = 0  # padding between a leader and its patches, too
    packed = {
        "input_ids": torch.full_like(inside, VIDEO).masked_scatter(inside > 0, torch.cat([ids for ids, _ in TEXTS])),
        "segment_starts": torch.ones_like(inside).masked_scatter(inside > 0, torch.cat([at for _, at in TEXTS])),
        "position_ids": torch.zeros_like(inside).masked_scatter(
            inside > 0, torch.cat([torch.arange(len(ids)) for ids, _ in TEXTS])
        ),
        "attention_mask": inside,
    }
    for told in (batch_of(TEXTS), batch_of(TEXTS, lambda number: (2, number), VIDEO), packed):
        found = model(**told, **pixels)
        real = told["attention_mask"] > 0
        assert_close(found.last_hidden_state[real], torch.cat([each[0][0] for each in alone]), **EXACT)
        assert_close(found.pooler_output, torch.cat([each.pooler_output for each in alone]), **EXACT)


@torch.no_grad()
def test_embeddings_of_tokens_say_where_patches_go():
    model, told = build(), batch_of(TEXTS) | {"pixel_values": some_pixels(3), "pixel_values_videos": some_pixels(6)}
    expected = model(**told)[0]
    embeds = model.embed_tokens(told.pop("input_ids"))
    assert_close(model(inputs_embeds=embeds, **told)[0], expected, **EXACT)


@torch.no_grad()
def test_a_video_is_five_or_four_dimensional():
    model, (ids, starts) = build(), row_of([2], 3, [2])
    told = {"input_ids": ids[None], "segment_starts": starts[None]}
    videos = some_pixels(2, 2)
    expected = model(**told, pixel_values_videos=videos)[0]
    assert_close(model(**told, pixel_values_videos=videos.flatten(0, 1))[0], expected, **EXACT)


@torch.no_grad()
def test_what_pixels_are_called_does_not_matter():
    """Pixels of every patch in another order, and the columns of the projection with them."""
    model, (ids, starts) = build(), row_of("image", 3)
    told = {"input_ids": ids[None], "segment_starts": starts[None]}
    order, images = torch.randperm(8), some_pixels(1)
    expected = model(**told, pixel_values=images)[0]
    rows = patches_of(images, 2)[:, order].view(2, 2, 2, 2, 2)  # [rows, columns, channels, height, width]
    turned = rows.permute(2, 0, 3, 1, 4).reshape(1, 2, 4, 4)
    projection = model.embed_modalities.patch_proj
    projection.weight.copy_(projection.weight[:, order].clone())
    assert_close(model(**told, pixel_values=turned)[0], expected, **EXACT)


@torch.no_grad()
def test_images_are_those_of_their_places():
    model, images = build(), some_pixels(2)
    rows = [row_of("image", 3), row_of("image", 3)]
    found = model(**batch_of(rows), pixel_values=images)[0]
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert_close(model(**batch_of(rows), pixel_values=images.flip(0))[0], found.flip(0), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["two_levels", "three_levels"])
def test_images_in_turns_of_a_dialogue(shape):
    fields = {"layer_types": ["level_0", "level_0", "level_1"]} if shape == "two_levels" else {}
    model, frames = build(shape=shape, **fields), some_pixels(5)
    turns = [row_of(3, "image"), row_of(4), row_of([3], "image", 2), row_of("image")]
    for _, starts in turns:
        starts[0] = 2
    images = some_pixels(3)
    shares = [(images[:1], None), (None, None), (images[1:2], frames[:3]), (images[2:], None)]
    state = None
    for (ids, starts), (some, others) in zip(turns, shares, strict=True):
        pixels = {"pixel_values": some, "pixel_values_videos": others}
        found, state = model.read_turn(state, ids[None], segment_starts=starts[None], **pixels)
    ids, starts = (torch.cat(parts)[None] for parts in zip(*turns, strict=True))
    whole = model(ids, segment_starts=starts, pixel_values=images, pixel_values_videos=frames[:3])
    assert_close(found.last_hidden_state, whole.last_hidden_state[:, -5:], **EXACT)
    count = int(whole.level_masks[0, -1].sum())
    assert_close(found.level_embeddings[:, -1, :count], whole.level_embeddings[:, -1, :count], **EXACT)


def pictures(head: str) -> dict[str, torch.Tensor]:
    """What a head takes, with labels: two texts of 20 tokens with an image and two frames each."""
    rows = [row_of(4, "image", [2]), row_of(4, "image", [2])]
    told = batch_of(rows) | {"pixel_values": some_pixels(2), "pixel_values_videos": some_pixels(2, 2)}
    labels = {"ForMaskedLM": told["input_ids"], "ForTokenClassification": told["input_ids"] % 2}
    labels |= {"ForSequenceClassification": torch.tensor([0, 1]), "ForMultipleChoice": torch.tensor([1])}
    labels |= {"ForSegmentClassification": torch.tensor([[0, 1, 1, 0]] * 2), "ForPreTraining": told["input_ids"]}
    if head == "ForMultipleChoice":
        told |= {name: told[name][None] for name in ("input_ids", "segment_starts", "attention_mask")}
    if head == "ForPreTraining":
        hidden = torch.zeros_like(told["input_ids"])
        hidden[:, 0] = 1
        told |= {"original_ids": told["input_ids"], "hidden_segments": hidden}
    return told | ({"labels": labels[head]} if head in labels else {})


def gradients(model, told) -> dict[str, torch.Tensor]:
    model.zero_grad()
    found = model(**told)
    loss = found.loss if "labels" in told else found.pooler_output.sum()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("head", ROW.heads)
def test_every_head_reads_them(head, tmp_path):
    """Gradients reach the patches, checkpointed or not, and a saved model is the same."""
    names = inspect.signature(ROW.load(head).forward).parameters
    assert set(MODALITIES.values()) <= set(names)
    model, told = build(head).train(), pictures(head)
    plain = gradients(model, told)
    assert all(plain[name].any() for name in plain if "embed_modalities" in name)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for name, gradient in gradients(model, told).items():
            assert_close(gradient, plain[name], **EXACT, msg=name)
    model.save_pretrained(tmp_path)
    again = ROW.load(head).from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.image_token_id == IMAGE
    with torch.no_grad():
        kept, found = (each.eval()(**told) for each in (model, again))
    assert_close(found[0], kept[0], **EXACT)


def test_text_alone_trains_all_parameters():
    """Processes of one model wait for every gradient."""
    model = build("ForMaskedLM")
    ids, starts = row_of(5, 3)
    found = gradients(model, {"input_ids": ids[None], "segment_starts": starts[None], "labels": ids[None]})
    assert not found["model.embed_modalities.patch_proj.weight"].any()


def test_lora_reaches_patches():
    model, told = build("ForMaskedLM"), pictures("ForMaskedLM")
    adapted = get_peft_model(model, hf_arch.lora_config(model)).double()
    adapted(**told).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any("patch_proj.lora_B" in name for name in trained)


@torch.no_grad()
def test_compiled_is_eager():
    model = build(segment_lengths=[5], num_hidden_layers=2, layer_types=["level_0", "level_1"])
    ids, _ = row_of(4, "image", [2])
    told = {"input_ids": ids[None], "pixel_values": some_pixels(1), "pixel_values_videos": some_pixels(1, 2)}
    expected = model(**told)[0]
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(**told)[0], expected, **EXACT)


def test_low_precision_reads_float_pixels():
    model = build("ForMaskedLM", shape="three_levels").to(torch.bfloat16)
    told = pictures("ForMaskedLM")
    told["pixel_values"] = told["pixel_values"].float()
    assert model(**told).logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(**told).logits.isfinite().all()


def test_pixels_and_placeholders_that_do_not_fit():
    model, (ids, starts) = build(), row_of(3, "image", [2])
    told, images, frames = {"input_ids": ids[None], "segment_starts": starts[None]}, some_pixels(1), some_pixels(1, 2)
    both = {"pixel_values": images, "pixel_values_videos": frames}
    model(**told, **both)
    with pytest.raises(ValueError, match="holds 4 image tokens, and pixel_values 0 images of 4 patches"):
        model(**told, pixel_values_videos=frames)
    with pytest.raises(ValueError, match="holds 8 video tokens, and pixel_values_videos 3 images"):
        model(**told, pixel_values=images, pixel_values_videos=some_pixels(3))
    with pytest.raises(ValueError, match="holds 0 image tokens, and pixel_values 1 images"):
        model(some_tokens().clamp(max=90), pixel_values=images)
    with pytest.raises(ValueError, match=r"pixel_values are \[1, 2, 8, 8\]; the model reads images of \[2, 4, 4\]"):
        model(**told | both | {"pixel_values": torch.randn(1, 2, 8, 8)})
    for wrong in (starts * 0, starts.roll(1), starts.clone().index_fill_(0, torch.tensor([6]), 1)):
        with pytest.raises(ValueError, match="a leader and 4 placeholders; segment_starts says where"):
            model(**told | both | {"segment_starts": wrong[None]})
    with pytest.raises(ValueError, match="reads text alone"):
        Case(ROW, "Model").build()(some_tokens(), pixel_values=images)
    with pytest.raises(ValueError, match="pixel_values_videos are told to a model whose config has no video_token_id"):
        build(video_token_id=None)(**told, **both)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"image_token_id": 96}, "image_token_id 96 is padding, or not in the vocabulary of 96"),
        ({"video_token_id": IMAGE}, "image_token_id and video_token_id are both 94"),
        ({"image_size": 5}, "image_size 5 is not a multiple of patch_size 2"),
        ({"num_channels": 0}, "num_channels is 0; it must be at least 1"),
        (
            {"segment_lengths": [4]},
            r"a segment of 5 members, a leader and its patches, which does not fit into .* \[4\]",
        ),
        ({"segment_lengths": [], "layer_types": ["level_0"] * 3}, "does not fit into segment_lengths"),
    ],
)
def test_configurations_that_cannot_be(fields, said):
    with pytest.raises(StrictDataclassError, match=said):
        ROW.tiny_config(**PIXELS | fields)


def test_a_model_of_text_alone_says_nothing_of_pixels():
    config = ROW.tiny_config()
    assert "image_size" not in config.to_dict() and "embed_modalities" not in str(ROW.load("Model")(config))
    assert ROW.tiny_config(**PIXELS).to_dict()["image_size"] == 4
