"""Fingerprints of what a run reads: prompts, student and teacher. A resume notices that one has changed."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from opd.checkpoint.files import weight_files
from opd.checkpoint.whole_folder import write_whole
from opd.config.schema import Config
from opd.config.teacher import PoolTeacherConfig
from opd.data.prompt_sets import PromptSets
from opd.types import Prompt, TeacherInfo

INPUTS = "inputs.json"
BLOCK, BLOCKS = 1 << 16, 64
"""Bytes of a block, and how many of them are read of a large file of weights; its size counts too."""


def fingerprint_inputs(
    config: Config, prompts: PromptSets, teachers: Sequence[TeacherInfo]
) -> dict[str, str]:
    """A fingerprint for each setting that names data or a model; models that cannot be read have none.

    ``teachers`` are those of the run, as they describe themselves.
    """
    teacher = config.teacher
    members = teacher.members if isinstance(teacher, PoolTeacherConfig) else {}
    models = {
        "student.model": config.student.model,
        "teacher.model": teacher.model,
        **{f"teacher.members.{name}": member for name, member in members.items()},
    }
    found = {"data.train": _prompts(prompts.train), "data.eval": _prompts(prompts.eval)}
    for setting, model in models.items():
        digest = fingerprint_model(model) if model else None
        if digest is not None:
            found[setting] = digest
    if teachers:
        found["teacher"] = _digest(
            f"{t.model} {t.vocab_size} {t.tokenizer_fingerprint}" for t in teachers
        )
    return found


def require_same_inputs(folder: Path, found: Mapping[str, str], *, allow_changed: bool) -> None:
    """ValueError when a resumed run would read other data or models than it began with."""
    before = _read(folder)
    changed = [name for name in found if before.get(name, found[name]) != found[name]]
    if changed and not allow_changed:
        raise ValueError(
            f"since the run {folder} began, the contents of {' and '.join(changed)} have changed: put them "
            "back, give another run.dir, or go on all the same with run.allow_changed_inputs=true"
        )


def write_inputs(folder: Path, found: Mapping[str, str]) -> None:
    """Record the fingerprints in the run folder."""
    if found:
        write_whole(folder / INPUTS, json.dumps({**_read(folder), **found}, indent=1) + "\n")


def _read(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / INPUTS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _prompts(prompts: Iterable[Prompt]) -> str:
    """Of everything that is learned from or graded, in order."""
    return _digest(
        f"{p.uid} {p.answer!r} {p.teacher} "
        + " ".join(
            "-" if ids is None else ids.tobytes().hex()
            for ids in (p.token_ids, p.teacher_ids, p.completion_ids)
        )
        for p in prompts
    )


def fingerprint_model(model: str) -> str | None:
    """Of a folder's weights: names, sizes and ``BLOCKS`` blocks of each file; of a hub id, its commit."""
    folder = Path(model)
    if not folder.is_dir():
        return _cached_commit(model)
    try:
        files = weight_files(folder).files
    except ValueError:
        return None
    return _digest(f"{path.name} {_blocks(path)}" for path in files)


def _cached_commit(model: str) -> str | None:
    try:
        path = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def _blocks(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= BLOCK * BLOCKS:
            digest.update(file.read())
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}\n".encode())
    return digest.hexdigest()[:32]
