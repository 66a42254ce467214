"""``opd mask export | apply | undo`` lead from a run to a model and back, or say why they cannot."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.checkpoint.tensors import open_checkpoint
from opd.cli.main import run
from opd.delta.format import read_delta
from opd.mask.file import Origin
from opd.mask.mask import Mask
from tests.unit.delta.models import same_bits, touched, weights, write_folder


def mask_of(base: Path, kept: dict[str, list[int]]) -> Path:
    path = base.parent / "mask.safetensors"
    opened = open_checkpoint(str(base))
    Mask(
        indices={n: torch.tensor(kept.get(n, []), dtype=torch.int32) for n in opened.parameters},
        shapes=opened.parameters.shapes,
        origin=Origin(rule="largest", base=opened.fingerprint(), model=str(base)),
    ).save(path)
    return path


def test_a_change_outside_the_mask_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(torch.bfloat16)
    after = {n: t.clone() for n, t in before.items()}
    for i in (1, 3, 5):
        after["model.norm.weight"][i] += 1
    base = write_folder(tmp_path / "base", before)
    trained = write_folder(tmp_path / "trained", after)
    words = [
        "mask",
        "export",
        f"base={base}",
        f"trained={trained}",
        f"out={tmp_path}/d.safetensors",
    ]
    mask = mask_of(base, {"model.norm.weight": [0, 1, 3, 5]})
    assert run([*words, f"mask={mask}"]) == 0
    assert read_delta(tmp_path / "d.safetensors").rule == "largest"
    capsys.readouterr()
    (tmp_path / "d.safetensors").unlink()
    mask_of(base, {"model.norm.weight": [3]})
    assert run([*words, f"mask={mask}"]) == 2
    assert "2 of 3 changed weights of model.norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "d.safetensors").exists()
    mask_of(trained, {})
    assert run([*words, f"mask={mask}"]) == 2
    assert "the mask was made for" in capsys.readouterr().err


def test_the_commands_lead_from_a_run_to_a_model_and_back(
    quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, finished = quickstart / "student", tmp_path / "run"
    shutil.copytree(base, finished / "final")
    after = touched(load_file(base / "model.safetensors"))
    save_file(after, finished / "final" / "model.safetensors", metadata={"format": "pt"})
    file, made, back = (tmp_path / n for n in ("d.safetensors", "made", "back"))
    assert run(["mask", "export", f"base={base}", f"trained={finished}", f"out={file}"]) == 0
    assert "weights changed (33.3" in capsys.readouterr().out
    assert run(["mask", "apply", f"base={base}", f"delta={file}", f"out={made}"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert run(["mask", "undo", f"trained={finished}", f"delta={file}", f"out={back}"]) == 0
    assert same_bits(load_file(made / "model.safetensors"), after)
    assert open_checkpoint(str(back)).fingerprint() == open_checkpoint(str(base)).fingerprint()
    assert {p.name for p in made.iterdir()} == {p.name for p in base.iterdir()}
    assert read_delta(file).command.startswith("opd mask export base=")

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, after[name].bfloat16())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["export"], ["trained=... is missing"]),
        (["export", "bse=a"], ["bse", "did you mean base?"]),
        (["export", "--base", "a"], ["--base", "written key=value, as base=..."]),
        (["export", "base=a", "base=b"], ["twice"]),
        (["export", "base=B", "trained=B", "out=d"], ["out=d", ".safetensors"]),
        (["export", "base=nowhere/a", "trained=B", "out=d.safetensors"], ["nowhere/a"]),
        (
            ["export", "base=B", "trained=B", "out=d.safetensors", "dtype=int"],
            ["dtype=int", "bfloat16"],
        ),
        (
            ["export", "base=B", "trained=B", "out=d.safetensors", "format=lora"],
            ["format=lora", "shira"],
        ),
        (["export", "base=B", "trained=B", "out=d.safetensors", "others=drop"], ["shira"]),
        (["export", "base=B", "trained=B", "out=d.safetensors", "mask=no"], ["no mask file no"]),
        (["export", "base=B", "trained=B", "out=B/model.safetensors"], ["already exists"]),
        (["export", "base=B", "trained=run", "out=d.safetensors"], ["no final/ yet"]),
        (["apply", "base=B", "delta=d.safetensors", "out=o"], ["d.safetensors", "opd mask export"]),
        (["undo", "trained=B", "delta=B/config.json", "out=o"], ["config.json", "cannot be read"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_sentence(
    quickstart: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "B").symlink_to(quickstart / "student")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert run(["mask", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opd: ")
    assert error.count("\n") == 1
    for word in expected:
        assert word in error, error
