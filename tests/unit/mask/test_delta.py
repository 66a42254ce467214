"""A sparse checkpoint leads from base to trained and back, bit for bit, or refuses in a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.checkpoint.tensors import open_checkpoint
from opd.cli.main import _answer
from opd.delta.apply import apply_delta, undo_delta
from opd.delta.export import cast, export_delta
from opd.delta.format import Delta, read_delta
from opd.mask import rebuild
from opd.mask.file import Origin
from opd.mask.mask import Mask

Weights = dict[str, torch.Tensor]
Folder = Callable[[str, Weights], Path]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes a model folder of these weights, with companions."""

    def write(name: str, weights: Weights, **config: object) -> Path:
        path = tmp_path / name
        path.mkdir()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "made", **config}))
        (path / "tokenizer.json").write_text('{"made": 1}')
        return path

    return write


def weights(dtype: torch.dtype) -> Weights:
    """A matrix, a vector, a scalar, nothing, integers, and an odd number of bytes."""
    torch.manual_seed(0)
    return {
        EMBEDDING: torch.randn(9, 5).to(dtype),
        "model.layers.0.q.weight": torch.randn(8, 6).to(dtype),
        "model.norm.weight": torch.randn(7).to(dtype),
        "model.scale": torch.tensor(1.5).to(dtype),
        "model.none": torch.zeros(0, 3).to(dtype),
        "model.steps": torch.arange(3),
        "model.flags": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }


def touched(before: Weights, *names: str) -> Weights:
    """A copy with every third element of the named tensors changed (of all, unless named)."""
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name in names or after:
        after[name].view(-1)[::3] += 1
    return after


def same_bits(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype
        and ours[n].shape == theirs[n].shape
        and torch.equal(bits(ours[n]), bits(theirs[n]))
        for n in ours
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def exported(base: Path, trained: Path) -> Delta:
    return export_delta(
        open_checkpoint(str(base)), open_checkpoint(str(trained)), base.parent / "d.safetensors"
    )


def both_ways(base: Path, trained: Path) -> Delta:
    """Export, apply, undo; the folders hold the bits of trained and base."""
    delta = exported(base, trained)
    made, back = base.parent / "made", base.parent / "back"
    rebuild.write_trained(open_checkpoint(str(base)), delta, made)
    rebuild.write_base(open_checkpoint(str(trained)), delta, back)
    for ours, theirs in ((made, trained), (back, base)):
        found, expected = open_checkpoint(str(ours)), open_checkpoint(str(theirs))
        assert same_bits(
            {n: s.read() for n, s in found.items()}, {n: s.read() for n, s in expected.items()}
        )
    return delta


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


def test_coordinates_count_through_pieces(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.delta.format.CHUNK", 7)
    before = weights(torch.bfloat16)
    both_ways(folder("base", before), folder("trained", touched(before)))


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_takes_a_coordinate_and_an_element_per_changed_weight(
    folder: Folder, dtype: torch.dtype
) -> None:
    before = {"w": torch.randn(300, 200).to(dtype), "v": torch.randn(301).to(dtype)}
    delta = exported(folder("base", before), folder("trained", touched(before)))
    header = 8 + int.from_bytes(delta.path.read_bytes()[:8], "little")
    assert delta.path.stat().st_size == header + delta.count * (4 + dtype.itemsize)
    assert header < 2000


def test_a_live_model_turns_and_turns_back(folder: Folder) -> None:
    before = weights(torch.bfloat16)
    after = touched(before, EMBEDDING, "model.norm.weight")
    delta = exported(folder("base", before), folder("trained", after))
    live = {n: torch.nn.Parameter(t.clone(), t.is_floating_point()) for n, t in before.items()}
    live["model.layers.0.q.weight"] = torch.nn.Parameter(torch.ones(1))  # not among the changed
    apply_delta(live.items(), delta)
    for name in delta.changed:
        assert torch.equal(live[name], after[name])
        assert live[name].requires_grad
    undo_delta(live, delta)
    for name in delta.changed:
        assert torch.equal(live[name], before[name])


def test_transposed_memory_is_turned_too(folder: Folder) -> None:
    before = {"w": torch.randn(6, 4)}
    after = touched(before)
    delta = exported(folder("base", before), folder("trained", after))
    live = {"w": before["w"].t().contiguous().t()}
    apply_delta(live, delta)
    assert torch.equal(live["w"], after["w"])


def test_a_live_model_that_is_not_the_base_stays_as_it_was(folder: Folder) -> None:
    before = weights(torch.bfloat16)
    delta = exported(folder("base", before), folder("trained", touched(before)))
    live = {n: t.clone() for n, t in before.items()}
    live["model.steps"][1] += 1
    untouched = {n: t.clone() for n, t in live.items()}
    with pytest.raises(ValueError, match=r"model\.steps does not hold the bits of .*base"):
        apply_delta(live, delta)
    assert same_bits(live, untouched)
    with pytest.raises(ValueError, match=r"is float32 .* made for bfloat16"):
        apply_delta({n: t.float() for n, t in before.items()}, delta)
    with pytest.raises(ValueError, match="absent from the 0 tensors"):
        apply_delta({}, delta)


def test_another_base_or_trained_model_is_refused(folder: Folder, tmp_path: Path) -> None:
    before = weights(torch.bfloat16)
    delta = exported(folder("base", before), folder("trained", touched(before)))
    base, trained = (open_checkpoint(str(tmp_path / n)) for n in ("base", "trained"))
    with pytest.raises(ValueError, match=r"needs its base model .*base .*found .*trained"):
        rebuild.write_trained(trained, delta, tmp_path / "out")
    with pytest.raises(ValueError, match=r"needs its trained model .*trained .*found .*base"):
        rebuild.write_base(base, delta, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(ValueError, match="is there already"):
        rebuild.write_trained(base, delta, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base",
        "d.safetensors",
        "full",
        "trained",
    ]


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
        rebuild.write_trained(
            open_checkpoint(str(tmp_path / "base")), read_delta(cut), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match="no sparse checkpoint of ours"):
        read_delta(tmp_path / "base" / "model.safetensors")


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
    rebuild.write_trained(base, delta, tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert same_bits(made, {n: t.to(before[n].dtype) for n, t in masters.items()})
    assert delta.ends["trained"].model.endswith("trained cast to bfloat16")


def mask_of(base: Path, weights: Weights, kept: dict[str, list[int]]) -> Path:
    path = base.parent / "mask.safetensors"
    Mask(
        indices={n: torch.tensor(kept.get(n, []), dtype=torch.int32) for n in weights},
        shapes={n: tuple(t.shape) for n, t in weights.items()},
        origin=Origin(
            rule="largest", base=open_checkpoint(str(base)).fingerprint(), model=str(base)
        ),
    ).save(path)
    return path


def test_a_change_outside_the_mask_is_found(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(torch.bfloat16)
    after = {n: t.clone() for n, t in before.items()}
    for i in (1, 3, 5):
        after["model.norm.weight"][i] += 1
    base, trained = folder("base", before), folder("trained", after)
    words = [
        "mask",
        "export",
        f"base={base}",
        f"trained={trained}",
        f"out={tmp_path}/d.safetensors",
    ]
    mask = mask_of(base, before, {"model.norm.weight": [0, 1, 3, 5]})
    assert _answer([*words, f"mask={mask}"]) == 0
    assert read_delta(tmp_path / "d.safetensors").rule == "largest"
    capsys.readouterr()
    (tmp_path / "d.safetensors").unlink()
    mask_of(base, before, {"model.norm.weight": [3]})
    assert _answer([*words, f"mask={mask}"]) == 2
    assert "2 of 3 changed weights of model.norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "d.safetensors").exists()
    mask_of(trained, before, {})
    assert _answer([*words, f"mask={mask}"]) == 2
    assert "the mask was made for" in capsys.readouterr().err


def test_the_commands_lead_from_a_run_to_a_model_and_back(
    quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = quickstart / "student", tmp_path / "run"
    shutil.copytree(base, run / "final")
    after = touched(load_file(base / "model.safetensors"))
    save_file(after, run / "final" / "model.safetensors", metadata={"format": "pt"})
    file, made, back = (tmp_path / n for n in ("d.safetensors", "made", "back"))
    assert _answer(["mask", "export", f"base={base}", f"trained={run}", f"out={file}"]) == 0
    assert "weights changed (33.3" in capsys.readouterr().out
    assert _answer(["mask", "apply", f"base={base}", f"delta={file}", f"out={made}"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert _answer(["mask", "undo", f"trained={run}", f"delta={file}", f"out={back}"]) == 0
    assert same_bits(load_file(made / "model.safetensors"), after)
    assert open_checkpoint(str(back)).fingerprint() == open_checkpoint(str(base)).fingerprint()
    assert {p.name for p in made.iterdir()} == {p.name for p in base.iterdir()}
    assert read_delta(file).command.startswith("opd mask export base=")

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, after[name].bfloat16())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export"], ["base=... is missing"]),
        (["export", "bse=a"], ["bse", "did you mean base?"]),
        (["export", "--base", "a"], ["--base", "keys are base"]),
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
        (["export", "base=B", "trained=B", "out=B/model.safetensors"], ["is there already"]),
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
    told: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "B").symlink_to(quickstart / "student")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert _answer(["mask", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("opd: ")
    assert error.count("\n") == 1
    for word in told:
        assert word in error, error
