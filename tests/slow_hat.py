"""HAT as its paper writes it: loops over levels, segments and heads, one text at a time, on a dict of weights."""

import math

import torch
import torch.nn.functional as F

OURS = {"query": "mixer.q_proj", "key": "mixer.k_proj", "value": "mixer.v_proj", "output": "mixer.o_proj"} | {
    "norm": "residual.norm.mixer",
    "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj",
    "last_norm": "residual.norm.feed_forward",
}
THEIRS = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value"} | {
    "output": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "last_norm": "output.LayerNorm",
}


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(weights, name, x, others, heads):
    """Each of x [tokens, size] asks the `others`."""
    query = linear(weights, name["query"], x).chunk(heads, dim=-1)
    key, value = (linear(weights, name[part], others).chunk(heads, dim=-1) for part in ("key", "value"))
    answers = [(q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v for q, k, v in zip(query, key, value, strict=True)]
    return linear(weights, name["output"], torch.cat(answers, -1))


def post_norm(weights, name, x, answer, eps):
    """What a layer of BERT makes of x and what its attention answers."""
    x = norm(weights, name["norm"], x + answer, eps)
    if f"{name['up']}.weight" not in weights:
        return x
    inner = linear(weights, name["down"], F.gelu(linear(weights, name["up"], x)))
    return norm(weights, name["last_norm"], x + inner, eps)


def encoder(weights, prefix, names, x, heads, eps, others=None):
    """A layer of BERT on one text x [tokens, size], which asks the `others`, or itself."""
    name = {part: prefix + name for part, name in names.items()}
    answer = attention(weights, name, x, x if others is None else others, heads)
    return post_norm(weights, name, x, answer, eps)


def pooling(weights, prefix, x):
    """Equations 5 to 7 of HAN: one vector of a text."""
    share = (linear(weights, f"{prefix}mixer.in_proj", x).tanh() @ weights[f"{prefix}mixer.question"]).softmax(0)
    return (share[:, None] * x).sum(0)


def gru(weights, prefix, x):
    """Torch's own, on one text."""
    dim = x.shape[-1] // 2
    unit = torch.nn.GRU(2 * dim, dim, bidirectional=True, dtype=x.dtype)
    for side, end in enumerate(("_l0", "_l0_reverse")):
        part = slice(side * 3 * dim, (side + 1) * 3 * dim)
        getattr(unit, "weight_ih" + end).data = weights[f"{prefix}mixer.in_proj.weight"][part]
        getattr(unit, "bias_ih" + end).data = weights[f"{prefix}mixer.in_proj.bias"][part]
        getattr(unit, "weight_hh" + end).data = weights[f"{prefix}mixer.state_weight"][side]
        getattr(unit, "bias_hh" + end).data = weights[f"{prefix}mixer.state_bias"][side]
    return unit(x)[0].detach()


def segments_of(length: int, marks: list[int], level_lengths: list[int]) -> list[list[list[int]]]:
    """For each level, its segments, as lists of the indices of their members."""
    members, levels = list(range(length)), []
    for level, longest in enumerate(level_lengths):
        segments = []
        for index in members:
            last = level == len(level_lengths) - 1
            if not segments or (not last and (marks[index] > level or len(segments[-1]) == longest)):
                segments.append([])
            segments[-1].append(index)
        levels.append(segments)
        members = [segment[0] for segment in segments]
    return levels


def tokens_below(segments: list[list[int]], length: int) -> list[list[int]]:
    firsts = [segment[0] for segment in segments]
    return [list(range(start, end)) for start, end in zip(firsts, [*firsts[1:], length], strict=True)]


def slow_layer(weights, config, prefix, kind, stream, levels) -> None:
    """One layer, written into the stream [length, size]."""
    part, level = kind.split("_")
    heads, eps = config.num_attention_heads, config.norm_eps
    table = weights.get(f"embed_positions.levels.{level}.weight")
    for segment, below in zip(levels[int(level)], tokens_below(levels[int(level)], len(stream)), strict=True):
        x = stream[segment]
        if part in ("level", "gru") and level != "0" and table is not None:
            x = x + table[: len(segment)]
        if part == "level":
            stream[segment] = encoder(weights, prefix, OURS, x, heads, eps)
        elif part == "down":
            stream[below] = encoder(weights, prefix, OURS, stream[below], heads, eps, x)
        elif part == "gru":
            stream[segment] = gru(weights, prefix, x)
        elif config.residual_type == "replaced":
            stream[segment[0]] = pooling(weights, prefix, x)
        else:
            name = {part: prefix + name for part, name in OURS.items()}
            stream[segment[0]] = post_norm(weights, name, x[0], pooling(weights, prefix, x), eps)


def with_patches(weights, config, stream, ids, segments, images, frames):
    """`stream` [length, size] with pixels [channels, height, width] of `images` and `frames` in their segments."""
    images, frames, size, names = iter(images), iter(frames), config.patch_size, "embed_modalities."
    for segment in segments:
        token = int(ids[segment[1]]) if len(segment) > 1 else None
        modality = {config.image_token_id: 1, config.video_token_id: 2}.get(token, 0)
        if modality:
            pixels, places = next((images, frames)[modality - 1]), iter(segment[1:])
            for top in range(0, config.image_size, size):
                for left in range(0, config.image_size, size):
                    patch = pixels[:, top : top + size, left : left + size].flatten()
                    stream[next(places)] = linear(weights, f"{names}patch_proj", patch)
        stream[segment] = stream[segment] + weights[f"{names}modalities.weight"][modality]


def slow_hat(weights, config, ids: torch.Tensor, marks: list[int] | None = None, images=(), frames=()) -> torch.Tensor:
    """The last hidden states [length, size] of our model with the parameters `weights`, for ids [length]."""
    levels = segments_of(len(ids), marks or [0] * len(ids), config.level_lengths)
    stream = weights["embed_tokens.weight"][ids]
    if "embed_modalities.modalities.weight" in weights:
        with_patches(weights, config, stream, ids, levels[0], images, frames)
    if "embed_positions.levels.0.weight" in weights:
        for segment in levels[0]:
            stream[segment] = stream[segment] + weights["embed_positions.levels.0.weight"][: len(segment)]
    if config.embedding_norm:
        stream = norm(weights, "embed_norm", stream, config.norm_eps)
    for group, kind in zip(config.layer_groups, config.layer_types, strict=True):
        slow_layer(weights, config, f"layers.{group}.", kind, stream, levels)
    return stream


def slow_original(weights, fields, segments: list[torch.Tensor]) -> list[torch.Tensor]:
    """The last hidden states of each segment, from the tensors of an original checkpoint."""
    heads, eps, first = fields["num_attention_heads"], fields["layer_norm_eps"], fields["pad_token_id"] + 1
    table, kind = weights["embeddings.position_embeddings.weight"], weights["embeddings.token_type_embeddings.weight"]
    texts = [weights["embeddings.word_embeddings.weight"][ids] + kind[0] for ids in segments]
    texts = [x + table[first : first + len(x)] for x in texts]
    texts = [norm(weights, "embeddings.LayerNorm", x, eps) for x in texts]
    for number in range(fields["num_hidden_layers"]):
        layer, layout = f"encoder.layer.{number}.", fields["encoder_layout"][str(number)]
        if layout["sentence_encoder"]:
            texts = [encoder(weights, f"{layer}sentence_encoder.", THEIRS, x, heads, eps) for x in texts]
        if layout["document_encoder"]:
            leaders = torch.stack([x[0] for x in texts])
            leaders = leaders + weights[f"{layer}position_embeddings.weight"][1 : len(leaders) + 1]
            leaders = encoder(weights, f"{layer}document_encoder.", THEIRS, leaders, heads, eps)
            texts = [torch.cat((leader[None], x[1:])) for leader, x in zip(leaders, texts, strict=True)]
    return texts
