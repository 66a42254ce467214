"""Usage and configuration errors: one-line messages and exit status 2, before anything expensive."""

import json
from pathlib import Path

import pytest

from opd.cli.main import run


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error message of ``opd train quickstart ARGUMENTS``, which must be a usage error."""
    status = run(["train", "quickstart", *arguments])
    output = capsys.readouterr()
    assert status == 2, output.out + output.err
    assert "Traceback" not in output.err
    assert output.err.startswith("opd: ")
    return output.err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optim.learning_rate=1"], ["learning_rate"]),
        (["optim.lr=fast"], ["fast", "lr"]),
        (["loss=kl"], ["loss", "kl"]),
        (["train.precision=fp8"], ["fp8", "pure_bf16"]),
        (["optim.lr=-1"], ["optim.lr=-1", "more than 0"]),
        (["zero=4"], ["zero=4", "3 or less"]),
        (["rollout.n=0", "optim.lr=0"], ["rollout.n=0", "optim.lr=0"]),
        (["optim=sgd", "optim.momentum=0", "optim.nesterov=true"], ["nesterov", "momentum"]),
        (["launch.engine=torch", "launch.processes=2"], ["launch.processes=2", "one process"]),
        (["launch.processes=many"], ["launch.processes=many", "auto or a whole number ≥ 1"]),
        (["launch.processes=2.5"], ["launch.processes=2.5", "auto or a whole number ≥ 1"]),
        (["launch.processes=0", "zero=4"], ["launch.processes=0: allowed is 1 or more", "zero=4"]),
        (["data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["student.model=nowhere/at/all"], ["student.model=nowhere/at/all"]),
        (["teacher.model=nowhere/at/all"], ["teacher.model=nowhere/at/all"]),
        (["teacher.model=null"], ["teacher.model", "teacher.url"]),
        (["teacher.url=http://127.0.0.1:9"], ["http://127.0.0.1:9", "cannot be reached"]),
        (["rollout.max_tokens=500"], ["max_tokens", "128"]),
        (["rollout.max_tokens=122"], ["jsonl:", "tokens"]),
        (["train.prompts_per_step=100000"], ["prompts_per_step=100000", "4096"]),
        (["train.precision=pure_bf16", "zero=0"], ["pure_bf16", "zero=0"]),
        (["mask=file"], ["mask=file needs mask.path=MASK"]),
        (["mask=file", "mask.path=none.safetensors"], ["none.safetensors", "opd mask discover"]),
        (["mask=discover", "mask.rule=random"], ["rule=random", "density=..."]),
        (["mask=discover", "mask.rule=near"], ["near", "near_zero"]),
        (["mask=discover", "mask.density=0.1", "adapter=lora"], ["adapter=lora", "adapter=none"]),
        (["mask=study", "mask.density=0.1", "mask.arms=[random]"], ["mask.arms", "discovered"]),
        (["train.mask_scores=fisher", "zero=0"], ["train.mask_scores=fisher", "zero=1"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_usage_error_is_explained(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    sentence = refused(capsys, *arguments)
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "1+1=", "answer": "2"', ["rows.jsonl:2"]),
        ('{"question": "1+1="}', ["rows.jsonl:2", "prompt"]),
        ('{"prompt": 7}', ["rows.jsonl:2"]),
        ('{"prompt": ""}', ["rows.jsonl:2"]),
        (json.dumps({"prompt": "1+" * 100 + "1="}), ["rows.jsonl:2", "tokens"]),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, row: str, words: list[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "answer": "2"}\n' + row + "\n")
    sentence = refused(capsys, f"data.train={rows}")
    for word in words:
        assert word in sentence, sentence


def test_a_teacher_with_another_vocabulary_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quickstart: Path
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(quickstart / "teacher", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = refused(capsys, f"teacher.model={other}")
    assert "another tokenizer" in sentence


def test_a_folder_that_is_no_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    assert "not a run" in refused(capsys, "run.dir=thesis")


def test_a_launch_file_may_not_set_numerics(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.5}')
    assert "optim.max_grad_norm" in refused(capsys, "launch.deepspeed=ds.json")


def test_an_unknown_recipe_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "quickstrat"]) == 2
    assert "quickstart" in capsys.readouterr().err


def test_a_setting_of_another_choice_is_reported_as_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    complaint = refused(capsys, "teacher=local", "teacher.retries=3")
    assert "teacher.retries is a setting of teacher=server or teacher=pool, not of" in complaint
