"""The files of a folder that are the model are those that transformers loads."""

from pathlib import Path

import pytest
import torch

from opd.checkpoint.files import FILES
from opd.checkpoint.tensors import open_checkpoint
from tests.unit.checkpoint.models import Tensors, indexed, loaded, saved, written

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    folder = tmp_path_factory.mktemp("files") / "llama"
    return folder, saved("llama", folder, tie_word_embeddings=False)


def copied(llama: tuple[Path, Tensors], folder: Path) -> Tensors:
    """The configuration of the model without its weights, and the weights."""
    folder.mkdir()
    (folder / "config.json").write_bytes((llama[0] / "config.json").read_bytes())
    return llama[1]


def value(folder: Path) -> float:
    return float(open_checkpoint(str(folder))[NORM].read()[0])


def shift(tensors: Tensors, by: float) -> Tensors:
    return {name: tensor + by for name, tensor in tensors.items()}


@pytest.mark.parametrize("first", range(len(FILES)))
def test_the_file_that_transformers_prefers_is_read(
    llama: tuple[Path, Tensors], tmp_path: Path, first: int
) -> None:
    folder = tmp_path / "m"
    tensors = copied(llama, folder)
    for number, file in enumerate(FILES[first:], 1):
        if file.endswith(".index.json"):
            shard = "a.safetensors" if "safetensors" in file else "a.bin"
            written(folder, shift(tensors, number), shard)
            indexed(folder, dict.fromkeys(tensors, shard), file)
        else:
            written(folder, shift(tensors, number), file)
    found = open_checkpoint(str(folder))
    assert value(folder) == 2.0
    model = dict(loaded(folder).named_parameters())
    assert set(found) == set(model)
    assert all(torch.equal(found[name].read(), model[name]) for name in found)


@pytest.mark.parametrize(
    "file",
    [
        "model_old.safetensors",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model_old.bin",
        "model.fp16.safetensors",
    ],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_file_beside_the_model_changes_nothing(
    llama: tuple[Path, Tensors], tmp_path: Path, file: str, is_sharded: bool
) -> None:
    folder = tmp_path / "m"
    tensors = copied(llama, folder)
    if is_sharded:
        written(folder, tensors, "model-00001-of-00001.safetensors")
        where = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        indexed(folder, where, "model.safetensors.index.json")
    else:
        written(folder, tensors)
    before = open_checkpoint(str(folder)).fingerprint()
    written(folder, {"zz": torch.ones(3)} | shift(tensors, 1), file)
    assert open_checkpoint(str(folder)).fingerprint() == before


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("absent", [1, 2, 3])
@pytest.mark.parametrize("has_index", [False, True])
def test_a_shard_that_is_missing_is_named(
    llama: tuple[Path, Tensors], tmp_path: Path, ending: str, absent: int, has_index: bool
) -> None:
    folder = tmp_path / "m"
    tensors = copied(llama, folder)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    where = {
        name: f"{stem}-{n % 3 + 1:05d}-of-00003.{ending}" for n, name in enumerate(sorted(tensors))
    }
    for shard in sorted(set(where.values())):
        written(folder, {n: t for n, t in tensors.items() if where[n] == shard}, shard)
    if has_index:
        indexed(folder, where, f"{stem}.{ending}.index.json")
    assert set(open_checkpoint(str(folder))) == set(tensors)
    (folder / f"{stem}-{absent:05d}-of-00003.{ending}").unlink()
    with pytest.raises(
        ValueError, match=rf"lacks the shard {stem}-0000{absent}-of-00003\.{ending}"
    ):
        open_checkpoint(str(folder))


def test_numbered_shards_of_two_models_are_refused(tmp_path: Path) -> None:
    written(tmp_path, {"a": torch.ones(2)}, "model-00001-of-00001.safetensors")
    written(tmp_path, {"a": torch.ones(2)}, "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="no index and shards of 2 models"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            '{"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}',
            "lacks b, which the index",
        ),
        (
            '{"weight_map": {"a": "../elsewhere.safetensors"}}',
            r"the shard '\.\./elsewhere\.safetensors', allowed are files beside it",
        ),
        ("{}", "field 'weight_map' is missing"),
        ('{"weight_map": ["s.safetensors"]}', "field 'weight_map' should be an object"),
        ('{"weight_map": {"a":', "is not JSON"),
        ("[]", "should be an object, found"),
    ],
)
def test_an_index_that_its_shards_do_not_keep_is_refused(
    tmp_path: Path, index: str, words: str
) -> None:
    written(tmp_path, {"a": torch.ones(2)}, "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 7, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path: Path, file: str, kept: float) -> None:
    written(tmp_path, {"a": torch.ones(200)}, file)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: int(kept * len(data)) if kept == 0.5 else int(kept)])
    with pytest.raises(ValueError, match=rf"{file} cannot be read \(.*\): fetch it again"):
        open_checkpoint(str(tmp_path))


def test_a_folder_with_only_an_adapter_is_refused(tmp_path: Path) -> None:
    written(tmp_path, {"a": torch.ones(2)}, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match="holds an adapter and no model: merge it into some/base"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("file", ["consolidated.safetensors", "model.gguf", "weights.npz"])
def test_weights_that_transformers_does_not_load_are_no_model(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"found {file}; expected model.safetensors or"):
        open_checkpoint(str(tmp_path))


def test_a_tensor_in_two_shards_is_read_once_and_refused_where_they_differ(tmp_path: Path) -> None:
    written(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, "1.safetensors")
    written(tmp_path, {"b": torch.ones(2), "c": torch.ones(2)}, "2.safetensors")
    where = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    indexed(tmp_path, where, "model.safetensors.index.json")
    assert list(open_checkpoint(str(tmp_path))) == ["a", "b", "c"]
    for other in (torch.zeros(2), torch.ones(3), torch.ones(2).half()):
        written(tmp_path, {"b": other, "c": torch.ones(2)}, "2.safetensors")
        with pytest.raises(ValueError, match="hold different tensors b"):
            open_checkpoint(str(tmp_path))


def test_a_snapshot_of_links_is_read(tmp_path: Path) -> None:
    written(tmp_path / "blobs", {"a": torch.ones(2)}, "abc")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert list(open_checkpoint(str(snapshot))) == ["a"]


def test_an_old_file_that_is_no_archive_is_read(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert list(open_checkpoint(str(tmp_path))) == ["a"]


def test_a_file_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="state_dict is a dict, not a tensor"):
        open_checkpoint(str(tmp_path))
