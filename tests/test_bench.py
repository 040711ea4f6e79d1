"""The benchmark: that its yardsticks are right, that it takes turns, that what it writes is what it measured."""

import dataclasses
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from hf_arch import ARCHITECTURES, cli
from hf_arch.bench import environments, floors, race, report
from hf_arch.bench.contender import Contender
from hf_arch.bench.peers import LLAMA, PEERS, Environment, chosen_peers
from hf_arch.bench.process import Worker, WorkerFailed, Workers
from hf_arch.bench.results import Figure, Result, exponent, load
from hf_arch.bench.run import lengths_of, run
from hf_arch.bench.settings import MEASURES, SMALL, Settings, settings_for
from hf_arch.bench.worker.hugging_face import Ours, StaticTransformers, Transformers
from hf_arch.bench.worker.memory import in_a_fork, peak_bytes
from hf_arch.bench.worker.subject import held_bytes

REPOSITORY = Path(__file__).parent.parent
SHAPE = SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 50}
RATES = {"matmul": 1e9, "bandwidth": 1e8, "exponential": 1e7}


def test_exponents_are_those_of_the_growth():
    lengths = (512, 1024, 4096)
    for power in (0.0, 1.0, 2.0):
        assert exponent(lengths, [3 * length**power for length in lengths]) == pytest.approx(power)


def test_contenders_take_turns():
    order = []
    taken = race.in_turns(["A", "B"], 3, lambda runner: order.append(runner) or len(order))
    assert order == ["A", "B"] * 3
    assert taken == [[1, 3, 5], [2, 4, 6]]
    assert race.median_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0  # a slow round is slow for both


class Scripted:
    """Answers for a worker, in order; an exception is raised."""

    def __init__(self, answers):
        self.answers = iter(answers)

    def ask(self, do, limit, **request):
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def scripted(name, answers, model=None):
    return Contender(name, MEASURES, None, Scripted(answers), Settings(rounds=2), model)


def test_a_race_gives_medians_ratios_and_floors():
    model = floors.on_paper(ARCHITECTURES[0], "ForCausalLM", SHAPE)
    samples = [{"seconds": seconds, "rates": RATES} for seconds in (9.0, 1.0, 3.0)]  # the first warms up
    ours, theirs = scripted("ours", samples, model), scripted("theirs", samples[:1] + samples[:0:-1])
    known = {("ours", "forward", 64): {"peak_bytes": 7}}
    first, second = race.race([ours, theirs], "forward", 64, ours.settings, known)
    assert (first.seconds, first.ratio, first.peak_bytes, first.samples) == (2.0, None, 7, [1.0, 3.0])
    assert first.times_floor == pytest.approx(2.0 / floors.floor_seconds(model, "forward", 64, RATES))
    assert (second.seconds, second.floor) == (2.0, None)
    assert second.ratio == pytest.approx((3 / 1 + 1 / 3) / 2)


def test_a_failure_ends_one_contender_and_not_the_race():
    sample = {"seconds": 1.0, "rates": RATES}
    ours, theirs = scripted("ours", [sample] * 3), scripted("theirs", [sample, sample, WorkerFailed("ran dry")])
    first, second = race.race([ours, theirs], "forward", 64, ours.settings, {})
    assert first.seconds == 1.0
    assert (second.seconds, second.ratio, second.failure) == (None, None, "ran dry")
    assert "ran dry" in report.line(second)


def test_a_call_that_would_take_too_long_is_left_out():
    contender = scripted("slow", [])
    contender.history["forward"] = [(1024, 3.0), (2048, 12.0)]
    contender.refuse_what_takes_too_long("forward", 4096)
    with pytest.raises(WorkerFailed, match="about 192 s"):
        contender.warm_up("step", 8192)  # it would read the context first


def test_memory_is_what_tensors_keep_occupied():
    kept = torch.zeros(1000)
    holder = type("Holder", (), {})()
    holder.states, holder.again, holder.itself = {"a": [kept[:10]], "b": kept.view(10, 100)}, (kept,), holder
    assert held_bytes(holder) == 4000
    assert held_bytes(None) == 0


def test_the_peak_of_a_call_is_seen_and_leaves_no_trace():
    def peak_of(size):
        torch.ones(1000).sum()  # loads what the call needs
        return {"peak": peak_bytes(lambda: torch.ones(size // 4).sum(), torch.device("cpu"))}

    for size in (80_000_000, 20_000_000):  # the smaller second: it must not be told the mark of the first
        assert abs(in_a_fork(lambda size=size: peak_of(size))["peak"] - size) < 3e6
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_a_fork(lambda: 1 / 0)


@torch.no_grad()
def test_a_static_peer_decodes_in_its_room():
    peer = StaticTransformers(SHAPE, longest=64, **LLAMA)
    memory = peer.begin(torch.full((1, 20), 5), room=8)
    for _ in range(8):
        memory = peer.step(torch.full((1, 1), 5), memory)
    assert memory.get_seq_length() == 28
    assert held_bytes(memory) >= 2 * 2 * 28 * 64 * 4  # keys and values, layers, tokens, width, bytes
    assert peer.generate(torch.full((1, 20), 5), 4) > 0


def test_peers_of_a_row_are_of_its_size():
    ours, llama = Ours(SHAPE, 64, row="transformer", head="ForCausalLM"), Transformers(SHAPE, 64, **LLAMA)
    assert ours.parameters == llama.parameters
    ids = torch.randint(3, 50, (1, 16))
    assert ours.loss(ids).isfinite() and llama.loss(ids).isfinite()


def test_a_worker_that_ends_or_hangs_is_over():
    ended = Worker(sys.executable, 1, ("-c", "import sys; sys.exit(3)"))
    with pytest.raises(WorkerFailed, match="ended with code 3"):
        ended.ask("build", 30)
    ended.close()
    hanging = Worker(sys.executable, 1, ("-c", "import time; time.sleep(60)"))
    with pytest.raises(WorkerFailed, match="build took more than 0 s"):
        hanging.ask("build", 0.1)
    assert hanging.process.poll() is not None
    with pytest.raises(WorkerFailed):  # and again: nobody is there
        hanging.ask("time", 0.1)


def test_a_worker_that_was_left_takes_the_next_subject():
    build = {"do": "build", "subject": "hugging_face:Ours", "shape": SHAPE, "longest": 64, "device": "cpu"}
    with closing(Workers(1)) as workers:
        worker = workers.hire(sys.executable)
        for row in ("retnet", "transformer"):
            found = worker.ask(**build, dtype="float32", threads=1, row=row, head="ForCausalLM", limit=120)
            assert found["parameters"] > 0
            workers.dismiss(worker)
            assert workers.hire(sys.executable) is worker
        with pytest.raises(WorkerFailed, match="No architecture is called 'resnet'"):
            worker.ask(**build, dtype="float32", threads=1, row="resnet", head="ForCausalLM", limit=120)
        worker.close()
        workers.dismiss(worker)
        assert workers.hire(sys.executable) is not worker


def test_an_environment_is_made_once_torch_first(monkeypatch, tmp_path):
    commands = []

    def ran(command, **options):
        commands.append(command)
        (tmp_path / "old" / "bin").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environments.subprocess, "run", ran)
    old = Environment("old", packages=("transformers==4.36.2",), unaided=("torchscale==0.3.0",))
    python = environments.python_of(old, tmp_path)
    assert python == str(tmp_path / "old" / "bin" / "python")
    torch_version = f"torch=={torch.__version__.split('+')[0]}"
    assert [command[-1] for command in commands[2:]] == ["transformers==4.36.2", "torchscale==0.3.0"]
    assert torch_version in commands[1] and torch_version in commands[2] and "--no-deps" in commands[3]
    environments.python_of(old, tmp_path)
    assert len(commands) == 4
    environments.python_of(dataclasses.replace(old, unaided=()), tmp_path)
    assert len(commands) == 7
    assert environments.python_of(None) == sys.executable

    def failed(command, **options):
        return subprocess.CompletedProcess(command, 1, stderr="Looking\nNo matching distribution\n")

    monkeypatch.setattr(environments.subprocess, "run", failed)
    with pytest.raises(OSError, match="environment of old cannot be made: .*: No matching distribution"):
        environments.python_of(dataclasses.replace(old, packages=()), tmp_path)
    assert not (tmp_path / "old" / "made_from").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("retnett", "Did you mean retnet"),
        ("retnet --peers torchscal", "No peer is called 'torchscal'. Did you mean torchscale"),
        ("retnet --peers llama", "llama does the job of transformer"),
        ("--lengths 1", "32 or more"),
        ("--dtype int8", "no floating-point type"),
        ("--device cuda", "no GPU"),
        ("--output {folder} --render README.md", "{folder} holds no results"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", *arguments.format(folder=tmp_path).split()]) == 2
    assert message.format(folder=tmp_path) in capsys.readouterr().err


def test_peers_are_chosen_by_row_and_name():
    rows = {row.name: row for row in ARCHITECTURES}
    assert chosen_peers(None, rows.values()) == []
    assert chosen_peers([], rows.values()) == list(PEERS)
    assert [peer.name for peer in chosen_peers(["llama"], rows.values())] == ["llama"]
    assert {peer.row for peer in chosen_peers([], [rows["retnet"]])} == {"retnet"}
    assert all(peer.row in rows for peer in PEERS)


def test_lengths_are_those_asked_for():
    retnet, transformer = (next(row for row in ARCHITECTURES if row.name == name) for name in ("retnet", "transformer"))
    settings = settings_for()
    assert lengths_of("step", retnet, settings)[-1] == 65536 > lengths_of("step", transformer, settings)[-1]
    assert settings_for(lengths=[256, 64, 64]).lengths == dict.fromkeys(MEASURES, (64, 256))
    assert settings_for(lengths=[64]).longest >= 64 + settings.rounds * settings.steps


def result(**changes) -> Result:
    rates = {"matmul": 9e10}
    figures = [
        Figure("retnet", "forward", 2048, 0.2, [0.2], None, 0.1, 2.0, rates, 40_000_000, None, 10),
        Figure("retnet", "forward", 4096, 0.4, [0.4], None, 0.2, 2.0, rates, 80_000_000, None, 20),
        Figure("retnet", "forward", 8192, 0.8, [0.8], None, 0.4, 2.0, rates, 160_000_000, None, 40),
        Figure("torchscale", "forward", 4096, 0.6, [0.6], 1.5, rates=rates),
        Figure("torchscale", "forward", 8192, failure="would take about 90 s"),
        Figure("retnet", "step", 1024, 0.0015, [0.0015], None, 0.001, 1.5, rates, None, 524288),
    ]
    machine = {"processor": "A", "cores": 2, "gpu": None, "load": [0.1], "python": "3", "torch": "2", "date": "d"}
    told = {"machine": machine | {"transformers": "5"}, "settings": Settings().as_dict(), "figures": figures}
    return Result(**({"row": "retnet", "parameters": {"retnet": 5_760_000, "torchscale": 5_700_000}} | told | changes))


def test_results_are_kept(tmp_path):
    result().save(tmp_path)
    assert load(tmp_path) == [
        Result(**json.loads((tmp_path / "retnet.json").read_text()) | {"figures": result().figures})
    ]
    on_gpu = result(settings=Settings(device="cuda:0").as_dict())
    assert on_gpu.save(tmp_path).name == "retnet-cuda.json"
    assert result().exponents("retnet", "forward") == pytest.approx({"time": 1.0, "memory": 1.0, "operations": 1.0})


def test_tables_say_what_was_measured():
    lines = report.summary([result()]).splitlines()
    assert "| **RetNet** | 5.76 M | 400 (2.00) |  | 1.50 (1.50) |  | 80 |  | 0.52 |" in lines
    assert "| torchscale | 5.70 M | 600 (1.50) |  |  |  |  |  |  |" in lines
    page = report.page([result()]).splitlines()
    assert "| forward | 4096 | torchscale | 600 | 6827 |  | 1.50 | 90 |  |  |" in page
    assert "| forward | 8192 | torchscale | would take about 90 s |  |  |  |  |  |  |" in page
    assert "| forward | retnet | 1.00 | 1.00 | 1.00 |  |" in page


def test_the_table_goes_between_the_marks():
    text = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
    assert report.between_marks(text, "new") == "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter\n"
    with pytest.raises(ValueError, match="to put the table between"):
        report.between_marks("nothing here", "new")


def test_the_readme_shows_the_results():
    readme, results = (REPOSITORY / "README.md").read_text(), load(REPOSITORY / "benchmarks" / "results")
    shown = readme.split(report.START)[1].split(report.END)[0].strip()
    assert shown == (report.summary(results) if results else "")


def test_a_small_run_from_end_to_end(tmp_path, capsys):
    few = {"rounds": 2, "steps": 2, "sample_seconds": 0.001}
    settings = Settings(SHAPE, dict.fromkeys(MEASURES, (32, 64)), **few)
    (found,) = run(["transformer"], ["llama"], tmp_path, settings)
    assert {(figure.who, figure.measure, figure.length) for figure in found.figures} == {
        (who, kind, length) for who in ("transformer", "llama") for kind in MEASURES for length in (32, 64)
    }
    for figure in found.figures:
        assert figure.failure is None and figure.seconds > 0 and len(figure.samples) == 2
        assert (figure.times_floor is None) == (figure.ratio is not None) == (figure.who == "llama")
        assert (figure.peak_bytes is not None) == (figure.measure in ("forward", "training"))
        assert (figure.state_bytes is not None) == (figure.measure == "step")
    assert found.parameters["transformer"] == found.parameters["llama"]
    assert load(tmp_path)[0].parameters == found.parameters
    assert report.summary(load(tmp_path)) in capsys.readouterr().out
    assert (tmp_path / "transformer.png").stat().st_size < 200_000

    readme = tmp_path / "page.md"
    readme.write_text("<!-- bench --><!-- /bench -->")
    assert cli.main(["bench", "--output", str(tmp_path), "--render", str(readme)]) == 0
    assert "**Transformer**" in readme.read_text()
