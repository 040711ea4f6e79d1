"""What a run found, and the record of it: `results.json`, and `RESULTS.md`, which is made from that."""

import json
import re
from collections import Counter
from pathlib import Path

from hf_arch import ARCHITECTURES

from .fetch import VERSION

FOLDER = Path(__file__).parent
WORST_FIRST = ("failed", "skipped", "passed")
INTRODUCTION = """# transformers' common tests, row by row

Written by `make conformance` (all but the slow tests) and `make conformance-full` (all); a run changes the rows that it
ran. A test counts as skipped where any part of it is.

"""


class Run:
    """Outcomes by row and test."""

    def __init__(self):
        self.outcomes: dict[tuple[str, str], str] = {}
        self.reasons: dict[tuple[str, str], str] = {}
        self.seconds: Counter[str] = Counter()

    def note(self, report) -> None:
        """A test has a report per phase, and one per subtest: the worst counts."""
        told = dict(report.user_properties)
        test = told["row"], report.nodeid
        if report.when == "call" and not hasattr(report, "context"):
            self.seconds[told["row"]] += told["processor_seconds"]
        if report.when == "call" or not report.passed:
            self.outcomes[test] = min(report.outcome, self.outcomes.get(test, "passed"), key=WORST_FIRST.index)
        if report.skipped:
            self.reasons[test] = in_general(report.longrepr[2])

    def summary(self) -> dict[str, dict]:
        """For each row, how many tests passed and failed, and how many were skipped for which reason."""
        rows = {}
        for row in dict.fromkeys(row for row, _ in self.outcomes):
            counts = Counter(outcome for (name, _), outcome in self.outcomes.items() if name == row)
            skipped = [test for test, outcome in self.outcomes.items() if test[0] == row and outcome == "skipped"]
            rows[row] = {
                "transformers": VERSION,
                "passed": counts["passed"],
                "failed": counts["failed"],
                "skipped": dict(sorted(Counter(self.reasons[test] for test in skipped).items())),
            }
        return rows


def in_general(reason: str) -> str:
    """The reason without the name of the class that it was said of."""
    reason = re.sub(r"<class '[\w.]+'>|\bArch\w+", "the model", reason.removeprefix("Skipped: "))
    return reason[:1].upper() + reason[1:].rstrip(".")


def record(run: Run, full: bool) -> None:
    """Replace the rows that were run."""
    path = FOLDER / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    for row, found in run.summary().items():
        kept.setdefault(row, {})["full" if full else "quick"] = found
    kept = {row.name: kept[row.name] for row in ARCHITECTURES if row.name in kept}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    tables = [INTRODUCTION, rows_table(kept), "\n## Why tests are skipped\n\n", reasons(kept)]
    (FOLDER / "RESULTS.md").write_text("".join(tables))


def rows_table(kept: dict) -> str:
    lines = ["| row | run | transformers | passed | failed | skipped |", "|---|---|---|---|---|---|"]
    for row, runs in kept.items():
        for name, target in (("quick", "`make conformance`"), ("full", "`make conformance-full`")):
            if found := runs.get(name):
                counts = found["passed"], found["failed"], sum(found["skipped"].values())
                lines.append(f"| {row} | {target} | {found['transformers']} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def reasons(kept: dict) -> str:
    """How many tests of each row are skipped for which reason, in its fullest run."""
    skipped = {row: (runs.get("full") or runs["quick"])["skipped"] for row, runs in kept.items()}
    lines = [f"| reason | {' | '.join(skipped)} |", "|---" * (1 + len(skipped)) + "|"]
    for reason in sorted(set().union(*skipped.values())):
        counts = (str(found.get(reason, "")) for found in skipped.values())
        lines.append(f"| {reason.replace('|', '/')} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"
