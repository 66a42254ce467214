"""Signs that training goes wrong are seen in made histories, once each, and not in sound ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from opd.rollout.repetition import repeated_share
from opd.tracking.jsonl import find_row_faults, read_lines
from opd.tracking.report import write_report
from opd.tracking.runs import read_run
from opd.tracking.signs import WINDOW, SignTracker, find_signs, run_warnings
from tests.unit.tracking.made_runs import make_run

SOUND = {
    "loss/reverse_kl": 0.6,
    "rollout/length": 100.0,
    "rollout/truncated": 0.3,
    "student/entropy": 0.5,
    "rollout/repetition": 0.05,
}


def history(metric: str, *values: float | None) -> list[dict[str, float | None]]:
    """An evaluation, ten sound steps, then a step for each value."""
    sound = [{"step": float(step), **SOUND} for step in range(1, 11)]
    later = [{"step": float(11 + n), **SOUND, metric: v} for n, v in enumerate(values)]
    return [{"step": 0.0, "eval/t/accuracy": 0.3}, *sound, *later]


WRONG = [
    ("loss/reverse_kl", 9.0, "the divergence explodes: loss/reverse_kl is"),
    ("rollout/length", 5.0, "completions collapse: "),
    ("rollout/length", 900.0, "completions grow: "),
    (
        "student/entropy",
        0.001,
        "the student's entropy collapses: 0.001 nats a token, and began with 0.5",
    ),
    ("rollout/repetition", 0.9, "completions repeat themselves: "),
    ("rollout/truncated", 1.0, "all completions of 5 steps were cut"),
]


@pytest.mark.parametrize(("metric", "value", "words"), WRONG)
def test_a_sign_is_given_once_when_it_has_lasted(metric: str, value: float, words: str) -> None:
    rows = history(metric, *[value] * 20)
    (sign,) = find_signs(rows)
    assert sign.sentence.startswith(words)
    assert "\n" not in sign.sentence
    assert 11 <= sign.step <= 10 + WINDOW
    shown: list[str] = []
    tracker = SignTracker(shown.append, rows[:12])
    for row in rows[12:]:
        tracker.log(int(row["step"] or 0), {k: v for k, v in row.items() if v is not None})
    assert len(shown) == 1, "a resumed run gives it once too"
    shown.clear()
    SignTracker(shown.append, rows).log(40, {metric: value})
    assert shown == []


@pytest.mark.parametrize(("metric", "value", "words"), WRONG)
def test_one_odd_step_is_no_sign_where_it_is_a_matter_of_degree(
    metric: str, value: float, words: str
) -> None:
    near = {"rollout/length": 90.0, "loss/reverse_kl": 1.0, "student/entropy": 0.2}.get(metric, 0.4)
    assert find_signs(history(metric, *[near] * 20)) == []
    assert find_signs(history(metric, *[None] * 20)) == []
    if metric in ("rollout/truncated", "student/entropy", "rollout/repetition"):
        assert find_signs(history(metric, value, *[near] * 10)) == []


def test_a_divergence_that_explodes_at_once_is_seen() -> None:
    rows = [{"step": float(n), "loss/reverse_kl": 1e-4 if n == 1 else 7.5} for n in range(1, 8)]
    (sign,) = find_signs(rows)
    assert sign.step == 5
    assert "loss/reverse_kl is 6 nats a token, and began at 0.0001" in sign.sentence


def test_a_run_that_learns_shows_no_sign(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    assert run_warnings(run) == []
    assert "Warnings" not in write_report(tmp_path / "run").read_text()


def test_a_report_names_signs_gaps_and_skipped_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=40)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    changed = {"rollout/length": 0.2, "optim/skipped_steps": 3.0}
    collapsed = [json.dumps(json.loads(line) | changed) for line in lines[20:]]
    rows = [*lines[:5], *lines[8:12], lines[11], *lines[12:20], *collapsed]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    gap, double, sign, skipped = run_warnings(read_run(folder))
    assert gap == "metrics.jsonl: steps 5-7 are missing"
    assert double == "metrics.jsonl: steps 11 occur more than once"
    assert "completions collapse" in sign
    assert skipped.startswith("3 steps were skipped")
    page = write_report(folder).read_text()
    assert all(words in page for words in ("Warnings", gap, double, "completions collapse"))


def test_rows_of_metrics_are_one_a_step_in_order() -> None:
    def rows(*steps: int) -> list[dict[str, int]]:
        return [{"step": step} for step in steps]

    assert find_row_faults(rows(0, 1, 2, 3, 9), 3) == []
    assert find_row_faults(rows(0, 3, 3, 2), 5) == [
        "steps 1, 4-5 are missing", "steps 3 occur more than once", "steps 2 are out of order",
    ]  # fmt: skip
    assert read_lines(Path("nothing.jsonl")) == []


def test_repeated_sequences_are_counted() -> None:
    rng = np.random.default_rng(0)
    assert repeated_share(np.arange(100, dtype=np.int32)) == 0.0
    assert repeated_share(np.ones(3, np.int32)) == 0.0
    assert repeated_share(np.ones(103, np.int32)) == pytest.approx(0.99)
    assert repeated_share(np.tile(np.arange(10, dtype=np.int32), 10)) == pytest.approx(1 - 10 / 97)
    ids = rng.integers(0, 3, 300).astype(np.int32)
    grams = [tuple(ids[i : i + 4]) for i in range(297)]
    assert repeated_share(ids) == pytest.approx(1 - len(set(grams)) / len(grams))
