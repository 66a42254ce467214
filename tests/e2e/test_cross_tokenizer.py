"""A student of characters learns from a teacher of byte pairs, locally and over HTTP."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import opd

LIGHT = [
    "rollout=transformers", "eval.teacher_accuracy=false", "train.steps=10", "optim.min_lr_ratio=1",
    "eval.every=10", "data.eval_limit=64",
]  # fmt: skip
TEACHER_ACCURACY = 0.99


def trained(home: Path, *overrides: str) -> list[dict[str, Any]]:
    done = opd("train", "cross_tokenizer_quickstart", *LIGHT, *overrides, "run.dir=run", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("overrides", "metric"),
    [
        (["loss=uld"], "loss/uld"),
        (["loss=uld", "loss.unmatched=prefix"], "loss/uld"),
        (["loss=policy_gradient", "teacher=server", "teacher.backend=torch"], "loss/reverse_kl_k1"),
    ],
    ids=["uld", "uld_prefix", "policy_gradient_served"],
)
def test_most_of_the_gap_to_a_teacher_of_other_tokens_is_closed(
    overrides: list[str], metric: str, tmp_path: Path
) -> None:
    rows = trained(tmp_path, *overrides)
    before, after = (rows[at]["eval/addition/accuracy"] for at in (0, -1))
    assert before < 0.3
    assert after - before > 0.6 * (TEACHER_ACCURACY - before)
    assert rows[-1][metric] < rows[1][metric]
    assert rows[-1]["teacher/nll"] < rows[1]["teacher/nll"]


def test_the_doctor_scores_the_student_by_itself(tmp_path: Path) -> None:
    done = opd("doctor", "cross_tokenizer_quickstart", "rollout=transformers", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the student scored by itself" in done.stdout
