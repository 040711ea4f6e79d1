"""What each way to tell positions does past the length that a model was trained on.

The text repeats itself at a fixed distance, with noise, so that only positions help: a model is trained on 32 tokens,
and read at up to 128. One model is trained with RoPE, and its scalings are then put into the same weights. The numbers
differ between machines; what is asserted holds with a wide margin for every seed that was tried.
"""

import math

import pytest
import torch

from hf_arch import find

VOCABULARY, DISTANCE, LENGTH, NOISE = 16, 5, 32, 0.2
ROW = find("transformer")
FACTOR = {"factor": 4.0, "original_max_position_embeddings": LENGTH}
YARN = {"rope_type": "yarn"} | FACTOR


def config(**fields):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": None, "max_position_embeddings": LENGTH, "initializer_range": 0.05}
    sizes |= {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 16}
    return ROW.tiny_config("ForCausalLM", **(sizes | fields))


def text(batch, length, generator):
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    fresh = torch.rand(batch, length, generator=generator) < NOISE
    for t in range(DISTANCE, length):
        tokens[:, t] = torch.where(fresh[:, t], tokens[:, t], tokens[:, t - DISTANCE])
    return tokens


def trained(steps, seed=0, **fields):
    torch.manual_seed(seed)
    model = ROW.load("ForCausalLM")(config(**fields))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        tokens = text(12, LENGTH, generator)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def losses(model):
    """Over the second half of the trained length, and over each further stretch of that length."""
    tokens = text(32, 4 * LENGTH, torch.Generator().manual_seed(7))
    logits = model(tokens).logits[:, :-1].transpose(1, 2)
    by_position = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(0)
    ends = (LENGTH // 2, LENGTH, 2 * LENGTH, 3 * LENGTH, 4 * LENGTH)
    return [by_position[start - 1 : end - 1].mean().item() for start, end in zip(ends, ends[1:], strict=False)]


def long_factors():
    """For longrope, which leaves them to a search: those at which it is YaRN without its temperature."""
    plain, yarn = (
        ROW.load("Model")(config(rope_parameters=rope)).embed_positions.inv_freq for rope in (None, YARN.copy())
    )
    return (plain / yarn).tolist()


@pytest.fixture(scope="module")
def measured():
    rope = trained(220)
    scaled = {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "yarn": YARN,
        "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | FACTOR,
        "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": long_factors()} | FACTOR,
    }
    table = {"rope": losses(rope)}
    for name, rope_parameters in scaled.items():
        longer = {} if name == "dynamic" else {"max_position_embeddings": 4 * LENGTH}
        model = ROW.load("ForCausalLM")(config(rope_parameters=rope_parameters, **longer)).eval()
        model.load_state_dict(rope.state_dict())
        table[f"rope, {name}"] = losses(model)
    for position_type in ("xpos", "alibi", "t5"):
        table[position_type] = losses(trained(110, position_type=position_type))
    print(f"\nloss by position; {VOCABULARY} tokens guessed at random: {math.log(VOCABULARY):.2f}")
    print(f"{'':16}{'trained':>8}" + "".join(f"{f'to {n}x':>8}" for n in (2, 3, 4)))
    for name, row in table.items():
        print(f"{name:16}" + "".join(f"{loss:8.2f}" for loss in row))
    return table


def test_rope_fails_past_its_length_and_its_scalings_less(measured):
    rope = measured["rope"]
    assert rope[0] < 1.5  # it has learned
    assert rope[3] > math.log(VOCABULARY)  # worse than a guess
    for name in ("rope, yarn", "rope, longrope", "rope, llama3"):
        assert measured[name][3] < rope[3] - 0.5, name
    assert measured["rope, dynamic"][2] < rope[2] - 0.5  # it fails too, further out


def test_linear_scaling_needs_training(measured):
    """It puts tokens between the positions seen in training: worse than plain RoPE even inside the trained length."""
    assert measured["rope, linear"][0] > measured["rope"][0] + 1


def test_alibi_xpos_and_t5_do_not_blow_up(measured):
    growth = {name: row[3] - row[0] for name, row in measured.items()}
    assert growth["alibi"] < 0.3
    assert growth["xpos"] < 0.6 * growth["rope"]
    assert growth["t5"] < 0.6 * growth["rope"]


def test_learned_positions_end_with_an_error():
    model = ROW.load("ForCausalLM")(config(position_type="learned")).eval()
    with pytest.raises(ValueError, match="Position 127 is past the 32 learned positions"):
        losses(model)
