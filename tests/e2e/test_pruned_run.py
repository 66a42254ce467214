"""``opd prune`` and ``opd analyze prune=``: from the trained accuracy to the base's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import opd

SETTINGS = [
    "orders=[smallest]",
    "rollout=transformers",
    "data.eval_limit=24",
    "eval.kl_prompts=0",
]


def test_a_broken_model_is_the_base_again_when_all_its_moves_are_back(
    tmp_path: Path, quickstart: Path
) -> None:
    student, file = quickstart / "student", "model.safetensors"
    shutil.copytree(student, tmp_path / "broken")
    torch.manual_seed(0)
    weights = {
        n: t.float() + 0.3 * torch.randn(t.shape) for n, t in load_file(student / file).items()
    }
    save_file(weights, tmp_path / "broken" / file, metadata={"format": "pt"})
    words = [f"base={student}", "trained=broken", "out=pruned", *SETTINGS]
    done = opd("prune", *words, "recipe=quickstart", "shares=[0,1]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pruned = json.loads((tmp_path / "pruned" / "prune.json").read_text())
    broken, base = pruned["curves"]["smallest"]
    assert (broken["reverted"], base["reverted"]) == (0, pruned["moved"])
    assert pruned["moved"] == sum(w.numel() for w in weights.values())
    assert broken["accuracy"] == 0 < base["accuracy"] < 1
    assert base["low"] < base["accuracy"] < base["high"]
    assert base["accuracy"] * pruned["questions"] == pytest.approx(round(24 * base["accuracy"]))
    logs = tmp_path / "pruned" / "logs"
    shutil.rmtree(logs)
    again = opd("prune", *words, "recipe=quickstart", "shares=[0,1]", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert not logs.exists(), "what was examined before is not asked again"
    asked = opd("analyze", *words, "prune=quickstart", "shares=[0,1]", cwd=tmp_path)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert not logs.exists(), "the two commands share what they know"
    summary = json.loads((tmp_path / "pruned" / "summary.json").read_text())
    assert summary["prune"]["curves"] == pruned["curves"]
    page = (tmp_path / "pruned" / "report.html").read_text()
    assert "Which changes the model needs" in page
    assert f"{base['accuracy']:.3f} ({base['low']:.3f} to {base['high']:.3f})" in page
