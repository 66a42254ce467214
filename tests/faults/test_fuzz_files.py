"""Damaged and misshapen files: each is read as it was written, or refused in words."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file

from opd.checkpoint.tensors import open_checkpoint
from opd.cli.main import readable
from opd.config.data import DataConfig
from opd.config.launch import merged_deepspeed
from opd.config.train import Precision
from opd.data.prompts import load_prompts
from opd.data.tokenizer import read_tokenizer
from opd.delta.export import export_delta
from opd.delta.format import Side, read_delta
from opd.mask.describe import describe
from opd.mask.file import Origin, write_mask
from opd.mask.mask import Mask
from opd.run.recipe import find_recipe
from opd.tracking.report import compare_runs, write_report
from opd.train.checkpoints import MANIFEST, checkpoint_folder, set_damaged_aside, write_checkpoint
from opd.world import World
from tests.support.bad_files import HOSTILE, damaged, reshaped, reshaped_metadata
from tests.support.fuzz import fuzz, require_sentence, shares

QUICKSTART = find_recipe("quickstart").parent / "quickstart"
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def refused(read: Callable[[], object]) -> bool:
    """Whether ``read`` refuses in words; any other error is a failure."""
    try:
        read()
    except ValueError as error:
        require_sentence(readable(str(error)))
        return True
    return False


@shares(25)
def test_a_mask_file_is_right_or_refused(examples: int, tmp_path: Path) -> None:
    shapes = {"a": (40, 10), "b": (7,), "c": ()}
    kept = {"a": torch.arange(0, 400, 3), "b": torch.tensor([6]), "c": torch.tensor([0])}
    path = tmp_path / "mask.safetensors"
    write_mask(path, shapes, kept.items(), Origin(rule="delta", base="f", model="m", command="c"))
    content = path.read_bytes()

    def check(bad: bytes) -> None:
        path.write_bytes(bad)
        if refused(lambda: describe(Mask.read(path))):
            return
        mask = Mask.read(path)
        assert {name: tuple(shape) for name, shape in mask.shapes.items()} == shapes
        for name, index in kept.items():
            assert torch.equal(mask.indices[name].long(), index)

    fuzz(check, damaged(content) | reshaped_metadata(content), examples=examples)


@shares(25)
def test_a_sparse_checkpoint_is_right_or_refused(examples: int, tmp_path: Path) -> None:
    base = load_file(QUICKSTART / "student" / "model.safetensors")
    names = sorted(base)[:3]
    before = {name: base[name].clone() for name in names}
    after = {name: tensor.clone() for name, tensor in before.items()}
    for tensor in after.values():
        tensor.view(-1)[::5] += 1
    path = tmp_path / "delta.safetensors"
    folders = {}
    for side, tensors in (("base", before), ("trained", after)):
        folders[side] = write_model(tmp_path / side, tensors)
    export_delta(
        open_checkpoint(str(folders["base"])), open_checkpoint(str(folders["trained"])), path
    )
    content = path.read_bytes()

    def check(bad: bytes) -> None:
        path.write_bytes(bad)
        made: dict[str, torch.Tensor] = {}

        def convert() -> None:
            delta = read_delta(path)
            assert delta.count > 0
            assert float(delta.density) == delta.density
            for name in delta.changed:
                if name in before:
                    made[name] = delta.convert(name, before[name], Side.base)

        if not refused(convert):
            assert all(torch.equal(made[name], after[name]) for name in made)

    fuzz(check, damaged(content) | reshaped_metadata(content), examples=examples)


def write_model(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "made"}')
    return folder


@shares(20)
def test_a_model_folder_is_read_or_refused(examples: int, tmp_path: Path) -> None:
    student = QUICKSTART / "student"
    for file in student.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (student / "model.safetensors").read_bytes()
    config = json.loads((student / "config.json").read_text())
    names = sorted(load_file(student / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    settings = config | {"quantization_config": {"weight_block_size": [8, 8]}, "text_config": {}}

    def check(kind: str, bad: bytes, document: Any, shards: Any) -> None:
        model, about = tmp_path / "model.safetensors", tmp_path / "config.json"
        listed = tmp_path / "model.safetensors.index.json"
        model.write_bytes(bad if kind == "weights" else weights)
        about.write_text(json.dumps(document if kind == "config" else config))
        if kind == "index":
            listed.write_text(json.dumps(shards))
            model.rename(tmp_path / "other.safetensors")
        try:
            refused(lambda: [t.read() for t in open_checkpoint(str(tmp_path)).values()])
            refused(lambda: read_tokenizer(str(tmp_path)))
        finally:
            listed.unlink(missing_ok=True)

    fuzz(
        check,
        st.sampled_from(("weights", "config", "index")),
        damaged(weights),
        reshaped(settings),
        reshaped(index),
        examples=examples,
    )


@shares(20)
def test_a_damaged_run_checkpoint_is_never_used(examples: int, tmp_path: Path) -> None:
    def save(partial: str) -> None:
        (Path(partial) / "weights.bin").write_bytes(bytes(range(256)) * 4)

    for step in (2, 4):
        write_checkpoint(tmp_path, step, save, keep=9, world=ALONE)
    newest = checkpoint_folder(tmp_path, 4)
    whole = {file.name: file.read_bytes() for file in newest.iterdir()}
    manifest = json.loads(whole[MANIFEST])

    def check(name: str, document: Any, bad: bytes) -> None:
        changed = json.dumps(document).encode() if name == MANIFEST else bad
        (newest / name).write_bytes(changed)
        aside = set_damaged_aside(tmp_path)
        if aside:
            require_sentence(aside[0])
            (newest.parent / "damaged_step_000004").rename(newest)
        elif name != MANIFEST:
            assert changed == whole[name]
        else:
            assert isinstance(document, dict)
            assert document["step"] == 4
        (newest / name).write_bytes(whole[name])

    fuzz(
        check,
        st.sampled_from(("weights.bin", MANIFEST)),
        reshaped(manifest),
        damaged(whole["weights.bin"]),
        examples=examples,
    )


ROWS = [
    {"prompt": "one", "answer": "1", "uid": "u1", "teacher": "t"},
    {"prompt": [{"role": "user", "content": "two"}], "answer": 2, "completion": "x"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "three"}]},
]
FLAT = [{"prompt": "one", "answer": "1"}, {"prompt": 'a, "b"', "answer": "2"}]


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def as_lines(rows: Any) -> bytes:
    return "\n".join(
        json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])
    ).encode()


FILES = {
    "rows.jsonl": as_lines(ROWS),
    "rows.jsonl.gz": gzip.compress(as_lines(ROWS)),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": b'prompt,answer\none,1\n"a, ""b""",2\n',
    "rows.parquet": as_parquet(FLAT),
}
bad_rows = st.one_of(
    *(st.tuples(st.just(name), damaged(content)) for name, content in FILES.items()),
    st.tuples(st.just("rows.jsonl"), reshaped(ROWS).map(as_lines)),
    st.tuples(st.just("rows.json"), reshaped(ROWS).map(lambda rows: json.dumps(rows).encode())),
    st.tuples(st.just("rows.jsonl"), st.lists(st.sampled_from(HOSTILE)).map(as_lines)),
)
data_settings = st.sampled_from(
    [{}, {"answer_regex": r"\d"}, {"template": "{prompt}: {answer}"}, {"prompt_field": "messages"}]
)


@shares(25)
def test_rows_are_prompts_or_refused(examples: int, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(str(QUICKSTART / "student")).tokenizer

    def check(file: tuple[str, bytes], settings: dict[str, str]) -> None:
        path = tmp_path / file[0]
        path.write_bytes(file[1])

        def read() -> None:
            found = load_prompts(str(path), tokenizer, DataConfig(**settings))
            assert all(len(prompt.token_ids) for prompt in found.prompts)

        refused(read)

    fuzz(check, bad_rows, data_settings, examples=examples)


RECORDED = {"step": 1, "all": {}, "blocks": {}, "modules": {}}


@shares(15)
@pytest.mark.filterwarnings("ignore")
def test_a_run_folder_makes_a_page_or_is_refused(examples: int, tmp_path: Path) -> None:
    sample = {
        "step": 0, "task": "t", "uid": "u", "prompt": "p", "answer": "a", "completion": "c",
        "correct": True, "tokens": ["a", "b"], "gap": [0.5, -0.5],
    }  # fmt: skip
    documents: dict[str, Any] = {
        "metrics.jsonl": [
            {"step": 0, "eval/t/accuracy": 0.1, "time/eval": 1.0},
            {"step": 1, "loss/total": 0.5, "time/step": 2.0, "tokens/generated": 9},
            {"step": 2, "loss/total": None, "eval/t/accuracy": 0.4, "eval/t/teacher_accuracy": 0.9},
        ],
        "samples.jsonl": [sample, sample | {"step": 2}],
        "weights.jsonl": [RECORDED],
        "config.yaml": {
            "config": {"train": {"steps": 2}, "optim": {"lr": 0.1}},
            "choices": {"optim": "adamw"}, "command": "opd train x", "git": "abc",
            "versions": {"opd": "1"},
        },
    }  # fmt: skip
    written = {
        name: yaml.safe_dump(value).encode() if name == "config.yaml" else as_lines(value) + b"\n"
        for name, value in documents.items()
        if name != "weights.jsonl"
    }
    folder = tmp_path / "run"
    folder.mkdir()

    def check(file: tuple[str, Any]) -> None:
        for name, content in written.items():
            (folder / name).write_bytes(content)
        name, bad = file
        if not isinstance(bad, bytes):
            bad = yaml.dump(bad).encode() if name == "config.yaml" else as_lines(bad) + b"\n"
        (folder / name).write_bytes(bad)
        refused(lambda: write_report(folder))
        refused(lambda: compare_runs([folder, folder], tmp_path))
        (folder / "weights.jsonl").unlink(missing_ok=True)

    bad_files = [st.tuples(st.just(name), reshaped(value)) for name, value in documents.items()]
    bad_files += [st.tuples(st.just(name), damaged(content)) for name, content in written.items()]
    fuzz(check, st.one_of(bad_files), examples=examples)


@shares(10)
def test_a_launch_file_is_merged_or_refused(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    offload = {"device": "cpu", "pin_memory": True}
    zero = {"stage": 3, "offload_param": offload, "reduce_bucket_size": 5e8, "overlap_comm": True}
    document = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}

    def check(bad: Any) -> None:
        path.write_bytes(bad if isinstance(bad, bytes) else json.dumps(bad).encode())
        refused(
            lambda: merged_deepspeed(str(path), zero=2, precision=Precision.bf16, max_grad_norm=1.0)
        )

    content = json.dumps(document).encode()
    fuzz(check, reshaped(document) | damaged(content), examples=examples)
