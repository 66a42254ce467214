"""``opd train`` end to end: real vLLM, the real teacher server, DeepSpeed on two ranks."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.command import SMALL, opd

STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short run of the quickstart on two ranks, ZeRO 2, with offline tracking."""
    home = tmp_path_factory.mktemp("run")
    done = opd(
        "train",
        "quickstart",
        *SMALL,
        "run.dir=run",
        f"train.steps={STEPS}",
        "eval.every=3",
        "eval.k=2",
        "eval.samples=24",
        "eval.teacher_accuracy=true",
        "save.every=2",
        "zero=2",
        "launch.processes=2",
        "tracking=wandb",
        "tracking.mode=offline",
        cwd=home,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "before" in done.stdout
    assert "teacher" in done.stdout
    return home / "run"


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_samples(run: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] == STEPS]


def test_a_run_leaves_what_the_contract_says(run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step_000004",
        "step_000006",
    ]
    described = yaml.safe_load((run / "config.yaml").read_text())
    assert described["config"]["zero"] == 2
    assert described["choices"]["loss"] == "reverse_kl"
    assert described["versions"]["torch"]
    assert list((run / "wandb").glob("offline-run-*"))


def test_every_step_has_a_line_with_every_metric(run: Path) -> None:
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    task = "eval/addition"
    assert {f"{task}/accuracy", f"{task}/mean_at_k", f"{task}/reverse_kl"} <= rows[0].keys()
    assert rows[0][f"{task}/teacher_accuracy"] > 0.9
    assert all(f"{task}/teacher_accuracy" not in row for row in rows[1:])
    for row in rows[1:]:
        wanted = {
            "loss/total", "loss/reverse_kl", "teacher/nll", "rollout/length", "optim/grad_norm",
            "optim/lr", "sync/bytes", "time/rollout", "time/teacher", "time/learn", "time/sync",
            "tokens/generated", "tokens/trained", "engine/logp_gap",
        }  # fmt: skip
        assert wanted <= row.keys()
        assert row["tokens/generated"] == row["tokens/trained"]
        assert row["engine/logp_gap"] < 1e-4
    assert rows[-1][f"{task}/reverse_kl"] < rows[0][f"{task}/reverse_kl"]


def test_final_model_says_in_transformers_what_the_last_evaluation_said(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    samples = last_samples(run)
    assert len(samples) >= 12
    for sample in samples:
        prompt = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            written = model.generate(**prompt, do_sample=False, max_new_tokens=48)
        text = tokenizer.decode(written[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
        assert text == sample["completion"]


def test_final_model_says_in_vllm_what_the_last_evaluation_said(run: Path) -> None:
    done = opd(
        "eval",
        "quickstart",
        *SMALL,
        "model=run/final",
        "out=again.json",
        "eval.samples=24",
        cwd=run.parent,
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((run.parent / "again.json").read_text())
    expected = metrics(run)[-1]["eval/addition/accuracy"]
    assert again["metrics"]["eval/addition/accuracy"] == expected
    said = {s["uid"]: s["completion"] for s in again["samples"]}
    for sample in last_samples(run):
        assert said[sample["uid"]] == sample["completion"]


def test_the_same_command_on_a_finished_run_only_reports(run: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    done = opd(
        "train", "quickstart", *SMALL, "run.dir=run", f"train.steps={STEPS}", "eval.every=3",
        "eval.k=2", "eval.samples=24", "eval.teacher_accuracy=true", "save.every=2", "zero=2",
        "launch.processes=2", "tracking=wandb", "tracking.mode=offline", cwd=run.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout
    assert (run / "metrics.jsonl").read_text() == before


def test_a_run_folder_of_another_recipe_is_refused(run: Path) -> None:
    done = opd("train", "quickstart", *SMALL, "run.dir=run", "optim.lr=0.5", cwd=run.parent)
    assert done.returncode == 2
    assert "belongs to another run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_that_is_cut_short_is_set_aside_and_the_one_before_is_used(
    run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    newest = copy / "checkpoints" / "step_000006"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(100)
    command = yaml.safe_load((copy / "config.yaml").read_text())["command"]
    done = opd(*shlex.split(command)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("opd: warning: ")]
    assert "step_000006 is damaged" in warning
    assert largest.name in warning
    assert "resumes from step_000004" in warning
    assert "starting from step 4" in done.stdout
    assert (copy / "checkpoints" / "damaged_step_000006").is_dir()
    before, after = (load_file(folder / "final" / "model.safetensors") for folder in (run, copy))
    assert all(torch.equal(before[name], after[name]) for name in before)
