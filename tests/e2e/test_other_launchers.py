"""Without vLLM, server or our launcher: transformers writes, a local teacher scores, torchrun starts."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.command import SMALL, environment, opd

WITHOUT_VLLM = [*SMALL, "rollout=transformers", "teacher=local", "teacher.dtype=float32"]


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_torchrun_is_a_launcher_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
            "--standalone", "-m", "opd.cli.main", "train", "quickstart", *WITHOUT_VLLM,
            "run.dir=run", "train.steps=2", "loss=topk_reverse_kl", "loss.k=8", "loss.support=union",
            "adapter=lora", "adapter.r=4", "zero=3", "sync.verify_every=1",
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run)] == [0, 1, 2]
    assert max(row["sync/gap_max"] for row in rows(run)) < 1e-4
    assert (run / "final" / "model.safetensors").exists()
    assert (run / "report.html").exists()


def test_a_laptop_without_vllm_and_deepspeed_trains(tmp_path: Path) -> None:
    done = opd(
        "train", "quickstart", *WITHOUT_VLLM, "run.dir=run", "train.steps=3",
        "loss=policy_gradient", "loss.surrogate=plain", "loss.correction=truncate", "loss.discount=0.5",
        "launch.engine=torch", "launch.processes=1", "sync.verify_every=1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    last = rows(tmp_path / "run")[-1]
    assert last["sync/gap_max"] < 1e-4
    assert {"loss/reverse_kl_k1", "loss/correction_share"} <= last.keys()
