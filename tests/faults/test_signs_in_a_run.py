"""A run that goes wrong says so while it runs, in its report, and when it is resumed or compared."""

from pathlib import Path

from tests.support.command import SMALL, opd

COMMAND = [
    "train", "quickstart", *SMALL, "rollout=transformers", "teacher=local", "launch.engine=torch",
    "launch.processes=1", "train.steps=6", "save.every=0", "eval.every=0", "rollout.max_tokens=2",
    "optim.schedule=constant", "run.dir=run",
]  # fmt: skip
CUT = "all completions of 5 steps were cut at rollout.max_tokens"


def test_truncated_completions_and_lost_rows_are_told(tmp_path: Path) -> None:
    done = opd(*COMMAND, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(CUT) == 1
    assert CUT in (tmp_path / "run" / "report.html").read_text()
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:2], *lines[3:5], lines[4], *lines[5:]]) + "\n")
    compared = opd("report", "run", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert "warning: run: metrics.jsonl: steps 2 are missing" in compared.stdout
    again = opd(*COMMAND, "train.steps=7", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "up to step 6, steps 2 are missing; steps 4 occur more than once" in again.stderr
    assert CUT not in again.stdout, "told before the resume"
    steps = [line.split(",")[0] for line in metrics.read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in (0, 1, 3, 4, 5, 6, 7)]
