"""``opd train`` with teacher=pool: the recipe names teachers, the rows name one of them."""

import json
from pathlib import Path

from tests.support.command import SMALL, opd

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "recipes" / "quickstart"
RECIPE = f"""
defaults:
  - base
  - override teacher: pool
  - override rollout: transformers
  - override loss: reverse_kl
  - _self_
student:
  model: {QUICKSTART / "student"}
teacher:
  members:
    short: {QUICKSTART / "teacher"}
    long: {QUICKSTART / "teacher"}
  backend: torch
  replicas: 2
  sleep: true
data:
  train: train.jsonl
  eval: train.jsonl
  teacher_field: who
rollout:
  max_tokens: 16
train:
  steps: 2
launch:
  engine: torch
  processes: 1
"""


def _rows(source: Path, count: int) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in source.read_text().splitlines()[:count]]
    return [row | {"who": "long" if len(row["prompt"]) > 8 else "short"} for row in rows]


def test_a_run_learns_from_the_teachers_that_its_rows_name(tmp_path: Path) -> None:
    rows = _rows(QUICKSTART / "train.jsonl", 200)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pool.yaml").write_text(RECIPE)
    done = opd("train", "pool.yaml", *SMALL, "run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transport" in done.stdout
    run = tmp_path / "run"
    assert len(list((run / "logs").glob("teacher_*.log"))) == 2, "one model, two replicas"
    assert "bytes a token" in (run / "logs" / "rank_0.log").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"teacher/short/reverse_kl", "teacher/long/reverse_kl"} <= last.keys()
    assert not any(name.endswith("outside_mass") for name in last), "matrices of one size"


def test_a_row_that_names_nobody_is_refused_before_anything_starts(tmp_path: Path) -> None:
    rows = _rows(QUICKSTART / "train.jsonl", 40)
    rows[7]["who"] = "stranger"
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pool.yaml").write_text(RECIPE)
    done = opd("train", "pool.yaml", *SMALL, "run.dir=run", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 2
    assert "names teacher 'stranger', teacher.members has long, short" in done.stderr
