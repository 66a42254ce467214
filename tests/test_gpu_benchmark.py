"""benchmarks/gpu.py works: all of it runs on a CPU with a model of two layers, and its sums are right."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.gpu import Watched, difference, failures, learning_flop, peak_tflops, phase_peaks
from benchmarks.gpu_page import page
from benchmarks.gpu_parts import SIZES
from tests.support.command import environment

REPOSITORY = Path(__file__).parent.parent


def measured(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The figures and the page of a tiny measurement on the CPU."""
    out, markdown = folder / "gpu.json", folder / "gpu.md"
    done = subprocess.run(
        [
            sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny",
            "--out", str(out), "--markdown", str(markdown), "--minutes", "60", *words,
        ],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), markdown.read_text()


def require_weights_arrive(found: dict[str, float]) -> None:
    assert found["first_gap_mean"] < 1e-4
    assert found["gap_mean"] < 1e-4
    assert found["moved_mean"] > 100 * found["gap_mean"], "the push changed nothing that shows"
    assert found["tokens_per_s"] > 0


def test_engine_run_and_loss_are_measured(tmp_path: Path) -> None:
    results, text = measured(tmp_path, "--only", "loss", "engine", "run", "--dtypes", "float32")
    assert failures(results) == []
    require_weights_arrive(results["engine"]["float32"])
    run = results["run"]["float32"]
    assert run["gap_max"] < 1e-3
    assert all(used > 64 << 20 for used in run["peak_bytes"].values()), run["peak_bytes"]
    steps = run["steps"]
    assert steps["step_s"] >= max(steps[f"{p}_s"] for p in ("rollout", "teacher", "learn", "sync"))
    assert isinstance(run["plan"], dict) or "opd plan" in run["plan"]
    assert results["loss"]["float32"]["opd"]["value"] > 0
    for part in ("Engine in the rank", "A run of a few steps", "Peak memory of the run, float32"):
        assert part in text


@pytest.mark.slow
def test_everything_is_measured_in_both_formats(tmp_path: Path) -> None:
    results, text = measured(tmp_path)
    assert failures(results) == []
    assert results["teacher"]["float32"]["gap_max"] < 1e-4
    assert results["teacher"]["bfloat16"]["gap_mean"] < 0.05
    for dtype in ("float32", "bfloat16"):
        assert results["resume"][dtype]["resumed"]["equal_share"] == 1.0, "on a CPU, bit for bit"
    require_weights_arrive(results["engine"]["float32"])
    assert "Resumed against uninterrupted" in text


def test_the_peak_of_a_phase_is_of_its_own_seconds() -> None:
    rows = [
        {"step": 0},
        {"time/rollout": 2.0, "time/teacher": 1.0, "time/learn": 3.0, "time/sync": 1.0},
        {"time/rollout": 2.0, "time/teacher": 1.0, "time/learn": 3.0, "time/sync": 1.0},
    ]
    used = [(5, 7), (11, 40), (12.5, 30), (14, 60), (16.5, 20), (21.5, 50), (25, 65), (18.5, 99)]
    watched = Watched(used=[(float(t), b) for t, b in used], rows=[10.0, 20.0, 30.0])
    peaks = phase_peaks(watched, rows)
    assert peaks == {"start": 7, "rollout": 50, "teacher": 30, "learn": 65, "sync": 20}


def test_operations_of_learning_are_those_that_torch_counts() -> None:
    size = replace(SIZES["tiny"], prompts=2, prompt_tokens=4, new_tokens=4)
    model = Qwen2ForCausalLM(Qwen2Config(**size.shape))
    tokens = size.prompts * size.max_length
    ids = torch.randint(size.shape["vocab_size"], (size.prompts, size.max_length))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # every position goes through the head here
    assert learning_flop(size, tokens, tokens) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_final_weights_are_compared_bit_by_bit(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("other", 1.5)):
        (tmp_path / name / "final").mkdir(parents=True)
        weights = {"a": torch.ones(3), "b": torch.tensor([value])}
        save_file(weights, tmp_path / name / "final" / "model.safetensors")
    found = difference(tmp_path / "one", tmp_path / "other")
    assert found == {"equal_share": 0.75, "largest_difference": 0.5}
    assert difference(tmp_path / "one", tmp_path / "one")["equal_share"] == 1.0


def test_a_part_that_failed_is_on_the_page_and_in_the_status() -> None:
    results = {
        "machine": {"device": "cuda", "card": "NVIDIA H100 80GB HBM3", "driver": "580"},
        "size": "full",
        "seconds": 3.0,
        "teacher": {"bfloat16": {"error": "RuntimeError: out of memory\nat a|b"}},
        "resume": {"float32": {"again": {"equal_share": 1.0, "largest_difference": 0.0}}},
    }
    assert failures(results) == ["teacher bfloat16: RuntimeError: out of memory\nat a|b"]
    text = page(results)
    assert "NVIDIA H100 80GB HBM3 (driver 580)" in text
    assert (
        "Teacher server against transformers, bfloat16: RuntimeError: out of memory at a/b" in text
    )
    assert "| weights with the same bits, resumed | not measured |" in text


def test_utilisation_is_stated_for_known_cards_only() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "float32") == 19.5
    assert peak_tflops("NVIDIA GeForce GTX 1080", "bfloat16") is None
