"""A checkpoint becomes the model that a run of so many steps ends with, and can be evaluated."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd.run.model_names import find_base, resolved_model
from tests.support.command import SMALL, opd

LIGHT = [
    *SMALL, "rollout=transformers", "teacher=local", "launch.processes=1",
    "eval.task=heldout", "data.eval_limit=8", "eval.kl_prompts=2", "train.steps=2",
    "save.every=1",
]  # fmt: skip
MASKED = ["launch.engine=torch", "mask=discover", "mask.rule=random", "mask.density=0.3"]
DEEPSPEED = ["zero=1", "train.precision=bf16"]


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(MASKED, id="masked"), pytest.param(DEEPSPEED, id="zero", marks=pytest.mark.slow)],
)
def test_the_last_checkpoint_is_exported_as_the_final_model(
    overrides: list[str], tmp_path: Path
) -> None:
    done = opd("train", "quickstart", *LIGHT, *overrides, "run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in (1, 2):
        source = f"model=run/checkpoints/step_{step:06d}"
        done = opd("export", source, f"out=step_{step}", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two, final = (
        load_file(tmp_path / folder / "model.safetensors")
        for folder in ("step_1", "step_2", "run/final")
    )
    assert two.keys() == final.keys()
    assert all(torch.equal(two[name], final[name]) for name in final)
    assert all(two[name].dtype == final[name].dtype for name in final)
    assert not all(torch.equal(one[name], final[name]) for name in final)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    accuracy = [r["eval/heldout/accuracy"] for r in rows if "eval/heldout/accuracy" in r]
    _check_card((tmp_path / "step_2/README.md").read_text(), accuracy)
    evaluated = [
        "eval", "quickstart", "model=run/checkpoints/step_000002", "out=e.json",
        "rollout=transformers", "eval.task=heldout", "data.eval_limit=8",
    ]  # fmt: skip
    done = opd(*evaluated, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert metrics["eval/heldout/accuracy"] == pytest.approx(accuracy[-1])
    done = opd("export", "model=run", "out=step_2", cwd=tmp_path)
    assert done.returncode == 2
    assert "already exists" in done.stderr
    student = resolved_model("quickstart")
    for trained in ("run", "run/final", "run/checkpoints/step_000001"):
        assert find_base(str(tmp_path / trained), None) == student


def _check_card(card: str, accuracy: list[float]) -> None:
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert "after 2 steps" in card
    row = re.search(r"\| eval/heldout/accuracy \| (\S+) \| (\S+) \| 2 \|", card)
    assert row is not None
    assert [float(row[1]), float(row[2])] == pytest.approx([accuracy[0], accuracy[-1]], abs=1e-4)


def test_a_base_that_is_not_named_must_be_a_run_s(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base=\.\.\. is missing, and trained="):
        find_base(str(tmp_path), None)
    assert find_base(str(tmp_path), "gpt2") == "gpt2"
