"""schedule=one_step_off as a user runs it: stopped and resumed, it learns what a whole run learns."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.command import SMALL, opd

COMMAND = [
    "train", "quickstart", *SMALL, "train.steps=4", "data.eval=null", "save.every=2",
    "launch.processes=1", "launch.engine=torch", "rollout=transformers", "teacher=local",
    "schedule=one_step_off", "loss.correction=truncate",
]  # fmt: skip


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_with_the_rollouts_that_were_ahead(tmp_path: Path) -> None:
    for run, stops in {"whole": [None], "stopped": [2, None]}.items():
        for stop in stops:
            end = [] if stop is None else [f"train.stop_after={stop}"]
            done = opd(*COMMAND, f"run.dir={run}", *end, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    whole, stopped = (rows(tmp_path / run) for run in ("whole", "stopped"))
    assert [row.get("schedule/staleness") for row in whole] == [None, 0.0, 1.0, 1.0, 1.0]
    assert [row["loss/total"] for row in whole[1:]] == [row["loss/total"] for row in stopped[1:]]
    assert whole[2]["engine/logp_gap"] > 1e-5, "the engine's weights are a step older"
    weights = [
        load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "stopped")
    ]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_uncorrected_rollouts_of_older_weights_are_refused(tmp_path: Path) -> None:
    done = opd(*COMMAND, "loss.correction=none", "run.dir=refused", cwd=tmp_path)
    assert done.returncode == 2
    assert "use loss.correction=truncate" in done.stderr + done.stdout
