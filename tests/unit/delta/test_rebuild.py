"""A sparse checkpoint leads from base to trained and back, bit for bit, or refuses in a sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opd.checkpoint.tensors import open_checkpoint
from opd.delta import rebuild
from opd.delta.rebuild import write_base, write_trained
from tests.unit.delta.models import (
    DTYPES,
    EMBEDDING,
    HEAD,
    Folder,
    bits,
    both_ways,
    exported,
    touched,
    weights,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_to_trained_and_back_is_exact(folder: Folder, dtype: torch.dtype) -> None:
    before = weights(dtype)
    after = touched(before)
    delta = both_ways(folder("base", before), folder("trained", after))
    changed = sum(int((bits(before[n]) != bits(after[n])).sum()) for n in before)
    assert delta.count == changed
    assert delta.density == changed / sum(t.numel() for t in before.values())
    assert "model.none" not in delta.changed


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_negative_zero_and_infinity_are_bits_like_any_other(
    folder: Folder, dtype: torch.dtype
) -> None:
    odd = [float("nan"), 0.0, -0.0, float("inf"), float("-inf"), 1.0]
    before = {"w": torch.tensor([x for x in odd for _ in odd]).to(dtype)}
    after = {"w": torch.tensor(odd * len(odd)).to(dtype)}
    bits(after["w"])[0] ^= 1  # another NaN
    delta = both_ways(folder("base", before), folder("trained", after))
    assert delta.count == 36 - 6 + 1


def test_nothing_changed_makes_an_empty_delta(folder: Folder) -> None:
    before = weights(torch.bfloat16)
    delta = both_ways(folder("base", before), folder("trained", before))
    assert delta.count == delta.density == 0


def test_everything_may_change(folder: Folder) -> None:
    before = {"w": torch.randn(64, 64), "v": torch.randn(5)}
    delta = both_ways(
        folder("base", before), folder("trained", {n: -2 * t for n, t in before.items()})
    )
    assert delta.density == 1


def test_a_tied_head_is_the_embedding_whether_or_not_the_file_repeats_it(folder: Folder) -> None:
    before = weights(torch.bfloat16)
    after = touched(before)
    base = folder("base", before | {HEAD: before[EMBEDDING].clone()}, tie_word_embeddings=True)
    trained = folder("trained", after, tie_word_embeddings=True)
    delta = both_ways(base, trained)
    assert EMBEDDING in delta.changed
    assert HEAD not in delta.changed


def test_shards_are_read_and_written(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(torch.float32)
    base = folder("base", before)
    names = sorted(before)
    where = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: before[n] for n in names if where[n] == shard}, base / shard)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    monkeypatch.setattr(rebuild, "SHARD_BYTES", 200)
    both_ways(base, folder("trained", touched(before)))
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "made").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())
    assert "model-0.safetensors" not in files


def test_companions_are_copied(folder: Folder, tmp_path: Path) -> None:
    before = weights(torch.bfloat16)
    base = folder("base", before)
    both_ways(base, folder("trained", touched(before)))
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "made" / name).read_text() == (base / name).read_text()


def test_another_base_or_trained_model_is_refused(folder: Folder, tmp_path: Path) -> None:
    before = weights(torch.bfloat16)
    delta = exported(folder("base", before), folder("trained", touched(before)))
    base, trained = (open_checkpoint(str(tmp_path / n)) for n in ("base", "trained"))
    with pytest.raises(ValueError, match=r"needs its base model .*base .*found .*trained"):
        write_trained(trained, delta, tmp_path / "out")
    with pytest.raises(ValueError, match=r"needs its trained model .*trained .*found .*base"):
        write_base(base, delta, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(ValueError, match="already exists"):
        write_trained(base, delta, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base",
        "d.safetensors",
        "full",
        "trained",
    ]
