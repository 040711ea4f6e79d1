"""The figures as text: a line while measuring, a summary for the README, a page with everything."""

from collections.abc import Sequence
from pathlib import Path

from hf_arch.bench import plots
from hf_arch.bench.results import Figure, Result, load
from hf_arch.bench.settings import MEASURES
from hf_arch.catalogue import find

START, END = "<!-- bench -->", "<!-- /bench -->"
SUMMARY_LENGTH = 4096
KINDS = {
    "forward": "a forward pass over the length",
    "training": "a forward and a backward pass",
    "step": "one token after a context of the length, by one call of the model",
    "generate": "one token after it, by `generate()`",
}
EXPLANATION = (
    f"Medians at {SUMMARY_LENGTH} tokens, or the longest length below it that was measured. In brackets: for ours, how "
    "many times its floor (its matrix products and exponentials, in decoding the reading of weights and state, at the "
    "rates of the machine measured beside it); for a peer, how many times our time (over 1: ours is faster). "
    "With one thread, times are of its processor."
)
MEMORY = (
    "Peak memory is what a call adds to a process that has the model loaded: on a CPU the high-water mark of the "
    "resident set in a fork made for this call, on a GPU what torch's allocator counts. State is what the cache keeps "
    "after a context, room for growth included. Contenders take turns, each in a process of its own."
)
GROWN = ("time", "memory", "operations", "state")


def line(figure: Figure) -> str:
    """What is shown when a figure is there."""
    start = f"{figure.who:19} {figure.measure:10}{figure.length:7}"
    if figure.seconds is None:
        return f"{start}  {figure.failure}"
    rate = f"{milliseconds(figure)} ms {figure.tokens_per_second:10.0f} tokens/s"
    compared = f"{figure.times_floor:6.2f} x floor" if figure.times_floor else ""
    compared = f"{figure.ratio:6.2f} x our time" if figure.ratio else compared
    return f"{start} {rate:>32} {compared:18} matmul {figure.rates['matmul'] / 1e9:.0f} GF/s"


def write(changed: Sequence[Result], folder: Path) -> None:
    """A picture of each row that changed, and the page of all that the folder holds."""
    for result in changed:
        plots.draw(result, folder / f"{result.name}.png")
    (folder / "README.md").write_text(page(load(folder)))


def between_marks(text: str, table: str) -> str:
    """`text` with `table` between its marks."""
    if START not in text or END not in text:
        raise ValueError(f"There is no {START} ... {END} to put the table between.")
    before, after = text.split(START)[0], text.split(END)[1]
    return f"{before}{START}\n{table}\n{END}{after}"


def summary(results: Sequence[Result]) -> str:
    """A line for each contender: what it costs at one length."""
    header = ["", "parameters", "forward, ms", "training, ms", "step, ms", "generate, ms"]
    header += ["forward, MB", "training, MB", "state, MB"]
    lines = [cells(result, who) for result in results for who in result.parameters]
    return "\n".join([*places(results), EXPLANATION, "", *table(header, lines)])


def cells(result: Result, who: str) -> list[str]:
    figures = {kind: typical(result.of(who, kind)) for kind in MEASURES}
    title = f"**{find(result.row).title}**" if who == result.row else f"{who}"
    memory = [figures["forward"].peak_bytes, figures["training"].peak_bytes, figures["step"].state_bytes]
    times = [milliseconds(figure) + in_brackets(figure) for figure in figures.values()]
    return [title, f"{result.parameters[who] / 1e6:.2f} M", *times, *map(megabytes, memory)]


def typical(figures: Sequence[Figure]) -> Figure:
    """The figure at SUMMARY_LENGTH, or else the longest below; an empty one where nothing was measured."""
    fitting = [figure for figure in figures if figure.length <= SUMMARY_LENGTH] or figures[:1]
    return fitting[-1] if fitting else Figure("", "", 0)


def page(results: Sequence[Result]) -> str:
    """All figures of all rows."""
    parts = ["# What was measured", f"Written by `hf-arch bench`.\n\n{summary(results)}"]
    parts += [f"`{kind}`: {meaning}." for kind, meaning in KINDS.items()]
    parts.append(MEMORY)
    return "\n\n".join([*parts, *map(section, results)]) + "\n"


def section(result: Result) -> str:
    header = [
        "measure",
        "length",
        "who",
        "ms",
        "tokens/s",
        "x floor",
        "x our time",
        "matmul GF/s",
        "peak MB",
        "state MB",
    ]
    lines = []
    for kind in MEASURES:
        for figure in sorted((f for f in result.figures if f.measure == kind), key=lambda f: f.length):
            lines.append([kind, str(figure.length), figure.who, *details(figure)])
    title = f"## {find(result.row).title}\n\n{places([result])[0].strip()}\n\n![{result.name}]({result.name}.png)"
    return f"{title}\n\n" + "\n".join(table(header, lines)) + f"\n\n{growth(result)}"


def growth(result: Result) -> str:
    """The fitted exponents."""
    grown = [
        [kind, who, *(f"{found[name]:.2f}" if name in found else "" for name in GROWN)]
        for kind in MEASURES
        for who in result.parameters
        if (found := result.exponents(who, kind))
    ]
    return "\n".join(["Growth, as powers of the length:", "", *table(["measure", "who", *GROWN], grown)])


def details(figure: Figure) -> list[str]:
    if figure.failure:
        return [figure.failure.replace("|", "/"), *[""] * 6]
    numbers = f"{figure.tokens_per_second:.0f}", optional(figure.times_floor), optional(figure.ratio)
    rate = f"{figure.rates['matmul'] / 1e9:.0f}"
    return [milliseconds(figure), *numbers, rate, megabytes(figure.peak_bytes), megabytes(figure.state_bytes)]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def places(results: Sequence[Result]) -> list[str]:
    """Where, when and with what results were measured; those of one setting in one line."""
    together: dict[str, list[Result]] = {}
    for result in results:
        together.setdefault(place(result), []).append(result)
    return [f"{where}; {conditions(found)}.  " for where, found in together.items()]


def place(result: Result) -> str:
    machine, settings, shape = result.machine, result.settings, result.settings["shape"]
    return (
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, {settings['threads']} "
        f"thread{'s' * (settings['threads'] > 1)}, {settings['dtype']}, batch 1, hidden {shape['hidden_size']}, "
        f"{shape['num_hidden_layers']} layers, {shape['num_attention_heads']} heads, feed-forward "
        f"{shape['intermediate_size']}, vocabulary {shape['vocab_size']}, {settings['rounds']} rounds, torch "
        f"{machine['torch']}, transformers {machine['transformers']}"
    )


def conditions(results: Sequence[Result]) -> str:
    """What changed between the results of one setting."""
    rates = [figure.rates["matmul"] / 1e9 for result in results for figure in result.figures if figure.rates]
    loads = [result.machine["load"][0] for result in results]
    dates = sorted({result.machine["date"] for result in results})
    speed = f"matrix products at {min(rates):.0f} to {max(rates):.0f} GF/s, " if rates else ""
    return f"{speed}load at the start {' to '.join(ends(loads))}, {' to '.join(ends(dates))}"


def ends(values: Sequence) -> list[str]:
    return [str(value) for value in dict.fromkeys((min(values), max(values)))]


def in_brackets(figure: Figure) -> str:
    compared = figure.ratio or figure.times_floor
    return f" ({compared:.2f})" if compared else ""


def milliseconds(figure: Figure) -> str:
    if figure.seconds is None:
        return ""
    value = 1000 * figure.seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def megabytes(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.2f}" if value < 1e7 else f"{value / 1e6:.0f}"


def optional(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
