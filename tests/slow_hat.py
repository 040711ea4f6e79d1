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


def encoder(weights, prefix, names, x, heads, eps):
    """A layer of BERT on one text x [tokens, size]."""
    name = {part: prefix + name for part, name in names.items()}
    answers = []
    query, key, value = (linear(weights, name[part], x).chunk(heads, dim=-1) for part in ("query", "key", "value"))
    for q, k, v in zip(query, key, value, strict=True):
        answers.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    x = norm(weights, name["norm"], x + linear(weights, name["output"], torch.cat(answers, -1)), eps)
    inner = linear(weights, name["down"], F.gelu(linear(weights, name["up"], x)))
    return norm(weights, name["last_norm"], x + inner, eps)


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


def slow_hat(weights, config, ids: torch.Tensor, marks: list[int] | None = None) -> torch.Tensor:
    """The last hidden states [length, size] of our model with the parameters `weights`, for ids [length]."""
    levels = segments_of(len(ids), marks or [0] * len(ids), config.level_lengths)
    tables = [weights[f"embed_positions.levels.{level}.weight"] for level in range(len(levels))]
    stream = weights["embed_tokens.weight"][ids]
    for segment in levels[0]:
        stream[segment] = stream[segment] + tables[0][: len(segment)]
    stream = norm(weights, "embed_norm", stream, config.norm_eps)
    for number, kind in enumerate(config.layer_types):
        level = int(kind.removeprefix("level_"))
        for segment in levels[level]:
            x = stream[segment] + (tables[level][: len(segment)] if level else 0)
            told = (OURS, x, config.num_attention_heads, config.norm_eps)
            stream[segment] = encoder(weights, f"layers.{number}.", *told)
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
