"""Measuring all tensors of two checkpoints, with one row each in a file from which a call resumes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.analysis.formatting import Spectrum
from opd.analysis.measure import measure_pair
from opd.analysis.pair import Pair, as_parts, pair_checkpoints
from opd.analysis.rows import Row
from opd.checked_json import read_json
from opd.checkpoint.chunks import THREADS, Progress, quiet
from opd.checkpoint.files import model_folder, weight_files

ROWS = "tensors.jsonl"
FORMAT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisInputs:
    """Folders or Hub ids: the base, the trained model, and a second trained model if any."""

    base: str
    trained: str
    other: str | None = None
    spectrum: Spectrum = Spectrum.exact

    def header(self) -> dict[str, Any]:
        """Identifies the inputs of a file of rows: the models, and sizes and times of their files."""
        models = {"base": self.base, "trained": self.trained, "other": self.other}
        return {"format": FORMAT, "spectrum": self.spectrum.value} | {
            side: None if model is None else {"model": model, "files": _file_stamps(model)}
            for side, model in models.items()
        }


def _file_stamps(model: str) -> list[list[Any]]:
    files = weight_files(model_folder(model)).files
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def measure_checkpoints(inputs: AnalysisInputs, out: Path, progress: Progress = quiet) -> list[Row]:
    """The rows of every tensor, in the order of names; finished ones are read from ``out``.

    Raises ValueError when a checkpoint cannot be opened, when no tensors can be compared, or when
    ``out`` holds the rows of another pair.
    """
    pairs = pair_checkpoints(inputs.base, inputs.trained)
    others: dict[str, Pair] = {}
    if inputs.other is not None:
        others = {pair.name: pair for pair in pair_checkpoints(inputs.base, inputs.other)}
        pairs = as_parts(pairs, {p.name for p in pairs if p.is_fused and p.name not in others})
    out.mkdir(parents=True, exist_ok=True)
    file = out / ROWS
    header = inputs.header()
    done = {row["name"]: row for row in _finished_rows(file, header)}
    total = max(1, sum(pair.numel for pair in pairs))
    with file.open("a") as rows:
        if not file.stat().st_size:
            rows.write(json.dumps(header) + "\n")
        missing = [pair for pair in pairs if pair.name not in done]
        measured = total - sum(pair.numel for pair in missing)
        for pair, row in measure_pairs(missing, others, inputs.spectrum):
            done[pair.name] = row
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            measured += pair.numel
            progress("measuring tensors", measured / total)
    return [done[pair.name] for pair in pairs]


def measure_pairs(
    pairs: Sequence[Pair], others: Mapping[str, Pair], spectrum: Spectrum = Spectrum.exact
) -> Iterator[tuple[Pair, Row]]:
    """Rows of pairs in the order in which they finish, THREADS at a time.

    The largest come first, so that no large one runs alone at the end. Each thread has its share of
    the cores, since the chunks of a tensor are too small for many.
    """

    def work(pair: Pair) -> tuple[Pair, Row]:
        return pair, measure_pair(pair, others.get(pair.name), spectrum)

    cores = torch.get_num_threads()
    share = (max(1, cores // THREADS),)
    pool = ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=share)
    try:
        ordered = sorted(pairs, key=lambda pair: -pair.numel)
        for done in as_completed([pool.submit(work, pair) for pair in ordered]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class _NamedRow:
    name: str


def _finished_rows(file: Path, header: dict[str, Any]) -> Iterator[Row]:
    """Rows of an earlier, interrupted call; a truncated last line is removed from the file."""
    if not file.is_file():
        return
    content = file.read_bytes()
    kept = content[: content.rfind(b"\n") + 1]
    if len(kept) < len(content):
        file.write_bytes(kept)
    lines = kept.splitlines()
    if not lines:
        return
    remedy = "remove the file, or give another out="
    if read_json(lines[0], dict[str, Any], f"{file}:1", remedy) != header:
        raise ValueError(
            f"{file.parent} holds the analysis of another pair, or its models or spectrum= have "
            "changed since: give another out=, or remove it"
        )
    for number, line in enumerate(lines[1:], start=2):
        read_json(line, _NamedRow, f"{file}:{number}", remedy)
        yield read_json(line, dict[str, Any], f"{file}:{number}", remedy)
