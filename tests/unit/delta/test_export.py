"""A sparse checkpoint is between a base and the same model trained, inside its mask if one is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.checkpoint.tensors import open_checkpoint
from opd.delta.export import cast, export_delta
from opd.delta.rebuild import write_trained
from tests.unit.delta.models import (
    Folder,
    both_ways,
    exported,
    same_bits,
    touched,
    weights,
)


def test_models_that_are_not_one_model_are_refused(folder: Folder) -> None:
    before = {"w": torch.randn(4, 4), "v": torch.randn(4)}
    base = folder("base", before)
    for name, other, words in (
        ("less", {"w": before["w"]}, r"base holds v and .*less does not"),
        ("more", before | {"u": torch.ones(1)}, r"more holds u and .*base does not"),
        ("shape", before | {"v": torch.ones(5)}, r"v is \[4\] in .* and \[5\] in"),
        ("half", before | {"v": before["v"].bfloat16()}, r"v is float32 .* dtype=float32"),
    ):
        with pytest.raises(ValueError, match=words):
            exported(base, folder(name, other))
    assert not (base.parent / "d.safetensors").exists()


def test_trained_masters_are_rounded_to_the_base_when_asked(folder: Folder, tmp_path: Path) -> None:
    before = weights(torch.bfloat16)
    masters = {
        n: t + 1e-6 if t.dtype == torch.float32 else t
        for n, t in touched(
            {n: t.float() if t.is_floating_point() else t for n, t in before.items()}
        ).items()
    }
    base = open_checkpoint(str(folder("base", before)))
    trained = cast(open_checkpoint(str(folder("trained", masters))), torch.bfloat16)
    delta = export_delta(base, trained, tmp_path / "d.safetensors")
    write_trained(base, delta, tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert same_bits(made, {n: t.to(before[n].dtype) for n, t in masters.items()})
    assert delta.models["trained"].name.endswith("trained cast to bfloat16")


def test_coordinates_count_through_chunks(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.delta.export.CHUNK", 7)
    before = weights(torch.bfloat16)
    both_ways(folder("base", before), folder("trained", touched(before)))
