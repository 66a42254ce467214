"""A file takes what it must, and one that is cut short or damaged is refused."""

from pathlib import Path

import pytest
import torch

from opd.checkpoint.tensors import open_checkpoint
from opd.delta.format import read_delta
from opd.delta.rebuild import write_trained
from tests.unit.delta.models import (
    DTYPES,
    Folder,
    exported,
    touched,
    weights,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_takes_a_coordinate_and_an_element_per_changed_weight(
    folder: Folder, dtype: torch.dtype
) -> None:
    before = {"w": torch.randn(300, 200).to(dtype), "v": torch.randn(301).to(dtype)}
    delta = exported(folder("base", before), folder("trained", touched(before)))
    header = 8 + int.from_bytes(delta.path.read_bytes()[:8], "little")
    assert delta.path.stat().st_size == header + delta.count * (4 + dtype.itemsize)
    assert header < 2000


def test_a_file_that_is_cut_short_or_damaged_is_refused(folder: Folder, tmp_path: Path) -> None:
    before = weights(torch.bfloat16)
    delta = exported(folder("base", before), folder("trained", touched(before)))
    whole = delta.path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read as a sparse checkpoint"):
            read_delta(cut)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    cut.write_bytes(flipped)
    with pytest.raises(ValueError, match="is damaged at"):
        write_trained(open_checkpoint(str(tmp_path / "base")), read_delta(cut), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match="is not an opd sparse checkpoint"):
        read_delta(tmp_path / "base" / "model.safetensors")
