"""The experiments: what their generators ask is told by what they show; their loop learns, counts and records."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from benchmarks.experiments import balance, context, evaluation_speed, induction, levels, page, passkey, recall
from benchmarks.experiments.contenders import CONTENDERS, chosen
from benchmarks.experiments.experiment import Experiment, keep, main
from benchmarks.experiments.record import load
from benchmarks.experiments.training import IGNORED, Batch, Schedule, accuracy, answers, train
from hf_arch import ARCHITECTURES

EXPERIMENTS = {experiment.name: experiment for experiment in page.EXPERIMENTS}
TINY = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cases() -> list:
    """Every generator, with every arguments that it is called with."""
    return [
        pytest.param(experiment, arguments, id=f"{experiment.name}-{size_name}-{column}")
        for experiment in page.EXPERIMENTS
        for size_name, size in experiment.sizes.items()
        for column, arguments in {"train": size.train, **size.tests}.items()
        if "length" in arguments
    ]


# What a perfect model would answer. Each is told the tokens alone, never the labels


def induction_oracle(tokens: list[int]) -> dict[int, int]:
    return {len(tokens) - 1: tokens[tokens.index(15) + 1]}


def recall_oracle(tokens: list[int]) -> dict[int, int]:
    values, found, place = {}, {}, 0
    while tokens[place] and tokens[place] not in values:
        values[tokens[place]] = tokens[place + 1]
        place += 2
    for position in range(place, len(tokens)):
        if tokens[position]:
            found[position] = values[tokens[position]]
    return found


def duplication_oracle(tokens: list[int]) -> dict[int, int]:
    second = tokens.index(0, 1)
    return {second + i: tokens[1 + i] for i in range(second - 1)}


def selective_copying_oracle(tokens: list[int]) -> dict[int, int]:
    data = [token for token in tokens if token > 1]
    return dict(zip(range(tokens.index(1), len(tokens)), data, strict=True))


def passkey_oracle(tokens: list[int]) -> dict[int, int]:
    key, ask = tokens.index(10), tokens.index(11)
    return {ask + i: tokens[key + 1 + i] for i in range(3)}


ORACLES = {
    "induction": induction_oracle,
    "recall": recall_oracle,
    "duplication": duplication_oracle,
    "selective_copying": selective_copying_oracle,
    "passkey": passkey_oracle,
}


class Oracle(nn.Module):
    """A causal language model that answers by a rule."""

    device = torch.device("cpu")

    def __init__(self, rule, vocabulary: int):
        super().__init__()
        self.rule, self.vocabulary, self.lm_head = rule, vocabulary, nn.Identity()

    def model(self, input_ids, use_cache):
        answer = torch.zeros_like(input_ids)
        for row, tokens in enumerate(input_ids.tolist()):
            for position, token in self.rule(tokens).items():
                answer[row, position] = token
        return type("Output", (), {"last_hidden_state": one_hot(answer, self.vocabulary).float()})


@pytest.mark.parametrize("experiment, arguments", cases())
def test_batches_are_what_a_model_takes(experiment, arguments):
    batch = experiment.make(generator(), 2, **arguments)
    size = next(size for size in experiment.sizes.values() if arguments in (size.train, *size.tests.values()))
    assert batch.input_ids.shape == batch.labels.shape and len(batch.labels) == 2
    assert batch.input_ids.dtype == batch.labels.dtype == torch.long
    asked = batch.labels[batch.labels != IGNORED]
    assert len(asked) and (batch.labels != IGNORED).any(dim=1).all()
    assert min(batch.input_ids.min(), asked.min()) >= 0
    assert max(batch.input_ids.max(), asked.max()) < size.shape["vocab_size"]
    assert torch.equal(batch.input_ids, experiment.make(generator(), 2, **arguments).input_ids)
    assert not torch.equal(batch.input_ids, experiment.make(generator(1), 2, **arguments).input_ids)


@pytest.mark.parametrize("name", ORACLES)
def test_the_context_determines_the_answers(name):
    experiment = EXPERIMENTS[name]
    size = experiment.sizes["small"]
    oracle = Oracle(ORACLES[name], size.shape["vocab_size"])
    for arguments in (size.train, *size.tests.values()):
        assert accuracy(oracle, experiment.make, arguments, examples=40) == 1.0
        batch = experiment.make(generator(3), 8, **arguments)
        for tokens, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            asked = {position: label for position, label in enumerate(labels) if label != IGNORED}
            assert ORACLES[name](tokens) == asked


@pytest.mark.parametrize("name", ORACLES)
def test_guessing_is_as_good_as_it_should_be(name):
    """One constant answer is right as often as chance says, at most: no answer is given away."""
    experiment, size = EXPERIMENTS[name], EXPERIMENTS[name].sizes["small"]
    labels = experiment.make(generator(), 2000, **size.train).labels
    commonest = labels[labels != IGNORED].bincount().max() / (labels != IGNORED).sum()
    assert commonest < {"recall": 0.05, "duplication": 0.02}.get(name, 0.15)


def test_a_text_asks_for_its_next_bytes():
    batch = context.make(generator(), 3, length=50)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    learned, held_out = (bytes(text.tolist()) for text in context.texts())
    assert bytes(batch.input_ids[0].tolist()) in learned
    assert held_out[:200] not in learned


def test_the_depth_of_a_pass_key_is_kept():
    for depth, place in ((0.0, 0), (0.5, 28), (1.0, 57)):
        batch = passkey.make(generator(), 1, length=64, depth=depth)
        assert batch.input_ids[0].tolist().index(passkey.KEY) == place, depth


def test_queries_come_once_each():
    batch = recall.make(generator(), 50, length=64, pairs=8, vocabulary=512)
    for tokens, labels in zip(batch.input_ids, batch.labels, strict=True):
        queries = tokens[labels != IGNORED]
        assert len(set(queries.tolist())) == 8 and set(queries.tolist()) == set(tokens[:16:2].tolist())
        assert not tokens[16:][labels[16:] == IGNORED].any()


def test_only_answers_make_the_loss():
    model = chosen(["retnet"])[0].build(TINY | {"vocab_size": 16})
    batch = induction.make(generator(), 3, length=12)
    logits, labels = answers(model, batch)
    assert logits.shape == (3, 16)
    torch.testing.assert_close(logits, model(input_ids=batch.input_ids).logits[:, -1])
    assert torch.equal(labels, batch.labels[:, -1])


def test_training_learns_ends_early_and_is_reproducible():
    def echo(generator, batch):
        tokens = torch.randint(8, (batch, 4), generator=generator)
        return Batch(tokens, tokens)

    def run():
        model = chosen(["retnet"])[0].build(TINY | {"vocab_size": 8})
        schedule = Schedule(steps=300, batch=16, learning_rate=3e-2, solved=0.1)
        return model, train(model, echo, {}, schedule, seed=5)

    model, trained = run()
    assert trained.steps < 300 and trained.loss < 0.1
    assert accuracy(model, echo, {}, examples=50) == 1.0
    again, retrained = run()
    assert retrained.curve == trained.curve
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_the_rate_rises_and_falls():
    schedule = Schedule(steps=100, batch=1, learning_rate=1.0)
    assert schedule.rate(0) < 0.25 and schedule.rate(5) > 0.9 and schedule.rate(99) < 0.01
    assert Schedule(steps=100, batch=1, learning_rate=1.0, cosine=False).rate(99) == 1.0


def test_contenders_are_rows_and_choices():
    rows = {row.name for row in ARCHITECTURES if "ForCausalLM" in row.heads}
    assert {contender.row.name for contender in CONTENDERS} == rows
    assert [contender.name for contender in chosen(["transformer-xpos", "retnet"])] == ["transformer-xpos", "retnet"]
    assert len(chosen(["transformer"])) == 5
    window = next(contender for contender in CONTENDERS if contender.choice == "window")
    assert window.build(TINY | {"vocab_size": 8}).config.layer_types == ["sliding_attention"]
    with pytest.raises(ValueError, match="no retnett; there are"):
        chosen(["retnett"])


def small(experiment: Experiment) -> Experiment:
    """The experiment as it is, but for a model and texts that take no time."""
    size = experiment.sizes["small"]
    tests = {column: arguments for column, arguments in size.tests.items() if arguments.get("length", 0) <= 128}
    schedule = Schedule(steps=3, batch=2, learning_rate=1e-3)
    made = vars(size) | {"shape": size.shape | TINY, "schedule": schedule, "tests": tests, "examples": 2, "seeds": 1}
    return Experiment(**(vars(experiment) | {"sizes": {"small": type(size)(**made)}}))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_runs_and_is_recorded(name, tmp_path, capsys):
    experiment = small(EXPERIMENTS[name])
    told = ["--output", str(tmp_path), "--architecture", "retnet", "transformer-alibi"]
    main(experiment, told)
    main(experiment, [*told, "--steps", "2"])  # takes the place of the first
    runs = json.loads((tmp_path / f"{name}.json").read_text())
    assert [(run["architecture"], run["steps"]) for run in runs] == [("retnet", 2), ("transformer-alibi", 2)]
    for run in runs:
        assert set(run["scores"]) >= {column for column in experiment.sizes["small"].tests if "at" not in column[:2]}
        assert run["machine"]["torch"] == torch.__version__
    text = page.section(experiment, runs)
    assert "| `transformer-alibi` |" in text and "at most 2 steps" in text
    assert capsys.readouterr().out.count("retnet") == 2


def test_a_memory_is_quicker_to_evaluate_with(tmp_path, capsys):
    evaluation_speed.main(["--lengths", "192", "--rounds", "1", "--output", str(tmp_path)])
    at = load("evaluation_speed", tmp_path)["milliseconds"]["192"]
    assert at["memory"] < at["window"] / 5
    assert f"| {at['window']:.0f} | {at['memory']:.2f} |" in evaluation_speed.section(
        load("evaluation_speed", tmp_path)
    )
    with pytest.raises(SystemExit):
        evaluation_speed.main(["--lengths", "100"])
    assert "more than the 128 tokens" in capsys.readouterr().err


def test_levels_are_timed(tmp_path):
    levels.main(["--lengths", "2048", "--rounds", "1", "--output", str(tmp_path)])
    found = load("levels", tmp_path)
    assert found["turns"]["whole"] > 2 * found["turns"]["10"]
    assert f"| 2048 | {found['seconds']['2048']['two']:.2f} |" in levels.section(found)
    assert "Not run yet" in levels.section(None)


def test_mistakes_in_the_command_are_explained(capsys):
    with pytest.raises(SystemExit):
        main(EXPERIMENTS["induction"], ["--architecture", "retnett"])
    assert "There is no retnett" in capsys.readouterr().err


def test_seeds_are_told_as_mean_and_range(tmp_path):
    for seed, score in enumerate((50.0, 100.0)):
        run = {"architecture": "retnet", "size": "small", "seed": seed, "scores": {"64": score}, "steps": 7}
        keep("x", run | {"parameters": 1000}, tmp_path)
    assert "| `retnet` | 1 K | 7 | 75.0 (50.0 - 100.0) |" in page.ours(load("x", tmp_path))


def test_the_page_is_rendered_from_what_was_recorded():
    assert page.PAGE.read_text() == page.page() + "\n", "run: python -m benchmarks.experiments.page"


def test_balance_is_measured(tmp_path, monkeypatch):
    nothing, biased = "DeepSeek: nothing", "DeepSeek: a bias that follows the load (0.001)"
    row, fields = balance.WAYS[biased]
    quick = {nothing: balance.WAYS[nothing], biased: (row, fields | {"router_bias_update_rate": 0.01})}
    monkeypatch.setattr(balance, "WAYS", quick)
    balance.main(["--steps", "30", "--output", str(tmp_path)])
    found = load("balance", tmp_path)
    assert found["ways"][biased]["busiest"] < found["ways"][nothing]["busiest"]
    assert f"| {biased} | {found['ways'][biased]['busiest']:.2f} |" in balance.section(found)
    assert "Not run yet" in balance.section(None)
