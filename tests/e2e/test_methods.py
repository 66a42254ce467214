"""Every method trains, from the command line, with what it alone needs."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.command import SMALL, opd

STUDENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"
LIGHT = [
    *SMALL, "rollout=transformers", "launch.processes=1", "train.steps=2", "eval.kl_prompts=8",
]  # fmt: skip


def trained(home: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run of contrast_quickstart in ``home``/run."""
    done = opd("train", "contrast_quickstart", *LIGHT, *overrides, "run.dir=run", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]


def test_sft_reads_its_completions_and_the_teacher_only_looks_on(tmp_path: Path) -> None:
    rows = trained(tmp_path, "method=sft", "rollout.max_tokens=48")
    assert rows[-1]["loss/nll"] > 0
    assert "eval/addition/reverse_kl" in rows[-1]
    assert not [name for name in rows[-1] if name == "engine/logp_gap"], "no engine wrote this"
    pushed = [row["step"] for row in rows if "sync/bytes" in row]
    assert pushed == [0, 2], "weights travel to be examined, not to write"


def test_sft_learns_the_assistant_s_turns_of_conversations(tmp_path: Path) -> None:
    shutil.copytree(STUDENT, tmp_path / "student")
    settings = tmp_path / "student" / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
    )
    given = json.loads(settings.read_text()) | {"chat_template": template + "{% endfor %}"}
    settings.write_text(json.dumps(given))
    with gzip.open(STUDENT.parent / "written.jsonl.gz", "rt") as lines:
        rows = [json.loads(next(lines)) for _ in range(16)]
    turns = [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        for row in rows
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    metrics = trained(
        tmp_path, "method=sft", "rollout=dataset", "rollout.max_tokens=48", "teacher=none",
        "student.model=student", "data.train=chats.jsonl", "data.prompt_field=messages",
        "data.completion_field=null", "data.eval=null", "data.limit=16",
    )  # fmt: skip
    assert 0 < metrics[-1]["loss/nll"] < 3
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_half_on_policy_learns_from_both(tmp_path: Path) -> None:
    rows = trained(
        tmp_path, "method=opd", "loss=jsd", "rollout.on_policy=0.5", "rollout.max_tokens=48"
    )
    assert 0 < rows[-1]["loss/jsd"] < 1
    assert rows[-1]["engine/logp_gap"] < 1e-4, "only of the tokens that the engine wrote"


def test_a_data_set_alone_needs_no_engine(tmp_path: Path) -> None:
    rows = trained(
        tmp_path, "method=offline", "rollout=dataset", "rollout.max_tokens=48", "data.eval=null"
    )
    assert rows[-1]["loss/forward_kl"] > 0
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_grpo_learns_from_rewards_of_groups(tmp_path: Path) -> None:
    rows = trained(tmp_path, "method=grpo", "rollout.n=4", "teacher=none", "rollout.max_tokens=48")
    assert 0 <= rows[-1]["reward/mean"] <= 1
    assert "eval/addition/reverse_kl" not in rows[-1]
    assert any(row.get("optim/grad_norm", 0) > 0 for row in rows)


def test_adapters_switched_off_are_the_teacher(tmp_path: Path) -> None:
    rows = trained(
        tmp_path, "method=self_distill", "adapter=lora", "launch.engine=deepspeed", "zero=2",
        "optim.lr=1e-2", "optim.warmup_steps=0", "train.steps=3",
        "data.teacher_template='{answer}{prompt}'", "data.eval_teacher_template='{prompt}'",
    )  # fmt: skip
    assert rows[0]["eval/addition/reverse_kl"] < 1e-6, "same weights, same prompt"
    assert rows[1]["loss/reverse_kl"] > 1e-3, "same weights, another prompt"
    assert rows[-1]["eval/addition/reverse_kl"] > 1e-6, "the student has left its teacher"


def test_an_averaged_teacher_resumes_bit_for_bit(tmp_path: Path) -> None:
    command = [
        "train", "contrast_quickstart", *LIGHT, "method=self_distill", "teacher.weights=ema",
        "teacher.ema_decay=0.5", "data.teacher_template='{answer}{prompt}'", "train.steps=4",
        "data.eval_teacher_template='{prompt}'", "save.every=2", "optim.warmup_steps=0",
    ]  # fmt: skip
    for arguments in (["run.dir=whole"], ["run.dir=cut", "train.stop_after=2"], ["run.dir=cut"]):
        done = opd(*command, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    whole, cut = (
        load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_opd_write_makes_what_sft_reads(tmp_path: Path) -> None:
    written = opd(
        "generate", "contrast_quickstart", "data.limit=24", "rollout=transformers",
        "only_correct=true", "out=w/t.jsonl", cwd=tmp_path,
    )  # fmt: skip
    assert written.returncode == 0, written.stdout + written.stderr
    lines = [json.loads(line) for line in (tmp_path / "w" / "t.jsonl").read_text().splitlines()]
    assert f"kept {len(lines)} " in written.stdout
    assert len(lines) > 18
    assert all(line["completion"].endswith("#" + line["answer"]) for line in lines)
    rows = trained(
        tmp_path, "method=sft", "data.train=w/t.jsonl", "data.limit=16", "rollout.max_tokens=48"
    )
    assert rows[-1]["loss/nll"] < 1


def test_the_doctor_scores_the_student_by_itself(tmp_path: Path) -> None:
    done = opd("doctor", "contrast_quickstart", "loss.support=union", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the student scored by itself: loss 0 nats a token" in done.stdout


def test_methods_can_be_swept(tmp_path: Path) -> None:
    done = opd(
        "train", "contrast_quickstart", "-m", *LIGHT, "method=sft,opd_pg", "train.steps=2",
        "rollout.max_tokens=48", "run.dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    names = {
        path.parent.name: json.loads(path.read_text().splitlines()[-1])
        for path in (tmp_path / "sweep").glob("*/metrics.jsonl")
    }
    assert names.keys() == {"method=sft", "method=opd_pg"}
    assert "loss/nll" in names["method=sft"]
    assert "loss/reverse_kl_k1" in names["method=opd_pg"]
