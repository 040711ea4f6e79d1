"""Routing Transformer answers as lucidrains' routing-transformer does where that keeps to the past, its centroids
follow the tokens of training, and it costs what its paper says.

The golden answers are of `RoutingTransformerLM` 1.6.1 in float64 (`goldens/make_routing_transformer.py`).
"""

import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import find
from hf_arch.bench.worker.serve import ON_CPU
from hf_arch.convert import convert
from hf_arch.modeling.ops.clustered_attention import clustered_attention

GOLDEN = Path(__file__).parent / "goldens" / "routing_transformer_lucidrains.safetensors"
EXACT = {"atol": 1e-8, "rtol": 1e-8}


def checkpoint(folder, model):
    """The golden's model as its tensors alone, how large its local blocks are, and its answers."""
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[model]
    tensors = {key.removeprefix(f"{model}."): x for key, x in load_file(GOLDEN).items() if key.startswith(f"{model}.")}
    weights = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in weights.items()}
    save_file(wide, folder / "weights.safetensors")
    return 2 * fields["local_attn_window_size"], tensors


@pytest.mark.parametrize("model, head", [("encoder", "Model"), ("decoder", "ForCausalLM")])
@torch.no_grad()
def test_equals_lucidrains(model, head, tmp_path):
    window, expected = checkpoint(tmp_path, model)
    ours = convert(tmp_path, "routing_transformer", local_window=window)
    assert type(ours).__name__ == f"ArchRoutingTransformer{head}"
    assert_close(ours(expected["ids"])[0], expected["answers"], **EXACT)


def test_what_the_original_has_and_ours_has_not(tmp_path):
    checkpoint(tmp_path, "decoder")
    weights = load_file(tmp_path / "weights.safetensors")
    memory = "routing_transformer.layers.layers.0.0.fn.global_attn.mem_key"
    save_file(weights | {memory: torch.ones(3, 1, 2, 6)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="num_mem_kv"):
        convert(tmp_path, "routing_transformer")
    left = {name: x for name, x in weights.items() if ".1.1.fn.fn." not in name}
    save_file(left, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="experts or of a product-key memory"):
        convert(tmp_path, "routing_transformer")


def routing(head="ForCausalLM", **fields):
    """A small model in float64."""
    row = find("routing_transformer")
    torch.manual_seed(0)
    return row.load(head)(row.tiny_config(head, initializer_range=0.2, **fields)).double().eval()


def some_hidden_states(length=70):
    return torch.randn(2, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def shown_to(mixer, x, size):
    """The definition, [batch, heads, query, key]: who sees whom among the routed heads of a decoder, where a token that
    sees others does not see itself."""
    query = mixer.q_proj(x).unflatten(-1, (-1, mixer.head_dim))[:, :, mixer.num_local_heads :]
    query = F.layer_norm(query, query.shape[-1:]).transpose(1, 2)
    nearest = (query @ mixer.centroids.value.transpose(1, 2)).argmax(-1)
    same = nearest[..., :, None] == nearest[..., None, :]
    block = (same.tril().sum(-1) - 1) // (size // 2)
    near = block[..., :, None] - block[..., None, :] <= 1
    shown = (same & near).tril(-1)
    alone = ~shown.any(-1, keepdim=True) & torch.eye(x.shape[1], dtype=torch.bool)
    return query, shown | alone


@torch.no_grad()
@pytest.mark.parametrize("clusters, size", [(4, 16), (9, 2), (1, 140)])
def test_routed_heads_see_the_last_tokens_of_their_cluster(clusters, size):
    """One cluster of blocks as long as the text is full attention."""
    model = routing(num_clusters=clusters, cluster_size=size, num_local_heads=0)
    mixer, x = model.model.layers[0].mixer, some_hidden_states()
    query, shown = shown_to(mixer, x, size)
    if clusters == 1:
        whole = torch.ones(70, 70, dtype=torch.bool).tril(-1)
        whole[0, 0] = True
        assert (shown == whole).all()
    value = mixer.v_proj(x).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(query, query, value, shown).transpose(1, 2).flatten(-2)
    assert_close(mixer(x), mixer.o_proj(expected), **EXACT)


@torch.no_grad()
def test_local_heads_see_their_block_and_the_one_before(tokens):
    model, changed = routing(num_local_heads=4, num_hidden_layers=1), tokens.clone()
    changed[:, 10] = 3 + changed[:, 10] % 90
    differs = (model(changed).logits - model(tokens).logits).abs().amax((0, 2)).gt(1e-12).nonzero().flatten()
    assert differs.min() == 10 and differs.max() == 17  # blocks of 6: the second, and the third


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.2, 0.5])
def test_later_tokens_change_nothing(tokens, scale):
    model, changed = routing(num_local_heads=0), tokens.clone()
    for parameter in model.parameters():
        parameter.normal_(std=scale)
    changed[:, 50:] = 3 + changed[:, 50:] % 90
    assert_close(model(changed).logits[:, :50], model(tokens).logits[:, :50], **EXACT)


@torch.no_grad()
def test_clusters_of_an_encoder_take_the_nearest_of_each_document():
    """In the words of the op, a cluster after another; documents with fewer tokens than a cluster would take."""
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 40, 2, 4, dtype=torch.float64, generator=draw) for _ in range(3)]
    near = [torch.randn(1, 2, 40, 3, dtype=torch.float64, generator=draw) for _ in range(2)]
    documents = torch.tensor([[1] * 25 + [0] * 3 + [2] * 5 + [0] + [3] * 6])
    output = clustered_attention(*tensors, *near, 8, documents=documents)
    for number in (1, 2, 3):
        place = (documents[0] == number).nonzero().flatten()
        for head in range(2):
            query, key, value = (x[0, place, head] for x in tensors)
            total, count = torch.zeros_like(value), torch.zeros(len(place), 1, dtype=torch.float64)
            for cluster in range(3):
                asking, told = (x[0, head, place, cluster].topk(min(8, len(place))).indices for x in near)
                weights = (query[asking] @ key[told].T / 2).softmax(-1)
                total[asking] += weights @ value[told]
                count[asking] += 1
            assert_close(output[0, place, head], total / (count + 1e-5), **EXACT)
    assert not output[documents == 0].any()


def learn(model, tokens, steps=1, lr=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        model.train()(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.model.layers[0].mixer.centroids


def routed_tokens(model, tokens):
    """What the centroids of the first layer are compared with, [heads, tokens, dim]."""
    found, centroids = [], model.model.layers[0].mixer.centroids
    affinity = centroids.affinity
    with patch.object(centroids, "affinity", lambda x: found.append(x) or affinity(x)):
        model.eval()(tokens)
    return F.normalize(found[0], dim=-1).permute(2, 0, 1, 3).flatten(1, 2)


def test_the_first_step_begins_the_centroids_from_all_that_it_saw(tokens):
    """Those of no token lie among the tokens, too. Padding counts for nothing, nor do passes in evaluation."""
    model = routing(num_clusters=40)
    with torch.no_grad():
        for layer in model.model.layers:  # all tokens in one direction, far from most centroids
            layer.mixer.q_proj.weight.mul_(0.1)
            layer.residual.norm["mixer"].bias.copy_(torch.randn(32))
    seen = routed_tokens(model, tokens)
    before = model.model.layers[0].mixer.centroids.value.clone()
    nearest = (seen @ before.transpose(1, 2)).argmax(-1)
    model(tokens)
    centroids = learn(model, tokens)
    assert centroids.steps == 1
    for head in range(2):
        chosen = nearest[head].unique()
        assert 1 < len(chosen) < 40
        for cluster in chosen:
            mean = seen[head][nearest[head] == cluster].sum(0)
            assert_close(centroids.value[head, cluster], F.normalize(mean, dim=0), atol=1e-6, rtol=1e-6)
    apart = [(seen @ value.transpose(1, 2)).amax(-1).mean() for value in (before, centroids.value)]
    assert apart[1] > apart[0]


def test_centroids_move_towards_their_tokens_and_stay_where_there_are_none(tokens):
    model = routing(num_clusters=40)
    centroids = learn(model, tokens)
    seen = routed_tokens(model, tokens)
    near = [(seen @ centroids.value.transpose(1, 2)).amax(-1).mean()]
    for _ in range(6):
        learn(model, tokens)
        near.append((seen @ centroids.value.transpose(1, 2)).amax(-1).mean())
    assert near[-1] > near[0] + 0.01 and centroids.steps == 7
    fixed = centroids.value.clone()
    centroids.steps.fill_(10**6)
    learn(model, tokens)
    moved = (centroids.value - fixed).norm(dim=-1)
    assert 0 < moved.max() < 0.002  # 1 - decay, of lengths of at most one
    nearest = (seen @ centroids.value.transpose(1, 2)).argmax(-1)
    idle = torch.stack([torch.isin(torch.arange(40), chosen, invert=True) for chosen in nearest])
    before = centroids.value.clone()
    learn(model, tokens)
    same = (centroids.value == before).all(-1)
    assert idle.any() and same[idle].all() and not same.all()


def test_padding_does_not_move_centroids(tokens):
    padded, mask = torch.cat((tokens, tokens[:, :9]), dim=1), torch.ones(2, 79, dtype=torch.long)
    mask[:, 70:] = 0
    plain, other = routing(), routing()
    learn(plain, tokens)
    other.train()(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss.backward()
    torch.optim.SGD(other.parameters(), lr=0.0).step()
    assert_close(dict(other.named_buffers()), dict(plain.named_buffers()), **EXACT)


@torch.no_grad()
def test_with_sqrt_n_clusters_the_cost_grows_as_n_to_the_three_halves():
    """Of a routed layer without its projections, for clusters that hold a text of n tokens between them."""

    def work(length):
        clusters = math.isqrt(length)
        fields = {
            "num_clusters": clusters,
            "cluster_size": 2 * clusters,
            "num_local_heads": 0,
            "num_attention_heads": 1,
        }
        mixer = routing(hidden_size=2, num_hidden_layers=1, **fields).model.layers[0].mixer.float()
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            mixer(torch.randn(1, length, 2))
        projections = sum(2 * length * x.weight.numel() for x in (mixer.q_proj, mixer.v_proj, mixer.o_proj))
        return counter.get_total_flops() - projections

    lengths = (2**10, 2**12, 2**14)
    powers = [math.log(work(4 * length) / work(length), 4) for length in lengths[:-1]]
    assert 1.25 < powers[0] < powers[1] < 1.5


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_clusters": 0}, "num_clusters is 0"),
        ({"cluster_size": 15}, "cluster_size is 15: it is that of two blocks"),
        ({"local_window": 7}, "local_window is 7"),
        ({"num_local_heads": 5}, "num_local_heads has 5; it must be between 0 and num_attention_heads 4"),
        ({"num_local_heads": [1]}, "num_local_heads has 1 entries for 2 layers"),
        ({"centroid_decay": 1.5}, "centroid_decay is 1.5"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "not default"),
        ({"direction": "bidirectional", "layer_types": ["routing"] * 2}, "bidirectional_routing, not routing"),
    ],
)
def test_contradictory_configs_fail(fields, said):
    with pytest.raises(StrictDataclassError, match=said):
        routing(**fields)
