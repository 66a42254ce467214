"""A mixture of experts, fused in memory, is trained while vLLM generates with its weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from tests.support.command import opd

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_and_learner_agree_on_experts_after_every_push(
    family: str, tmp_path: Path, quickstart: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "student")
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        **FAMILIES[family],
    )
    torch.manual_seed(0)
    student = tmp_path / "student"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(student)
    tokenizer.save_pretrained(student)
    done = opd(
        "train",
        "quickstart",
        f"student.model={student}",
        "teacher=local",
        f"teacher.model={quickstart / 'teacher'}",
        "rollout.kv_cache_memory_bytes=67108864",
        "rollout.max_tokens=16",
        "launch.processes=1",
        "launch.engine=torch",
        "train.steps=3",
        "train.prompts_per_step=4",
        "optim.lr=1e-2",
        "data.eval=null",
        "sync.verify_every=1",
        "run.dir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    gaps = [row["sync/gap"] for row in rows] + [r["engine/logp_gap"] for r in rows[1:]]
    assert len(gaps) == 7
    assert max(gaps) < 1e-5
    names = [_names(tmp_path / folder) for folder in ("student", "run/final")]
    assert names[0] == names[1]


def _names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())
