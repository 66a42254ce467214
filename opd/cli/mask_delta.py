"""``opd mask export | apply | undo``: a trained subnetwork as a small file, and back."""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from opd.config.arguments import explained, typed
from opd.config.masks import Others

if TYPE_CHECKING:
    from opd.delta.format import Delta
    from opd.delta.shira import Adapter
    from opd.checkpoint.tensors import Checkpoint


class Format(StrEnum):
    """How a trained subnetwork is written."""

    delta = "delta"
    shira = "shira"


class CastTo(StrEnum):
    """Number formats that trained weights can be rounded to before they are compared."""

    stored = "stored"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@dataclass(kw_only=True, slots=True)
class ExportCommand:
    """What `opd mask export` is told."""

    base: str = MISSING
    """Folder or hub id of the model that training started from."""
    trained: str = MISSING
    """Folder or hub id of the trained model, or the folder of a run (its final/ is meant)."""
    out: str = MISSING
    """File to write; with format=shira a folder."""
    mask: str | None = None
    """Mask file: refuse when a weight outside it changed."""
    dtype: CastTo = CastTo.stored
    """Round the trained weights to it first."""
    format: Format = Format.delta
    """delta: one file, exact both ways; shira: an adapter that PEFT loads."""
    others: Others = Others.refuse
    """format=shira: what such an adapter cannot hold is refused, or dropped with a warning."""


@dataclass(kw_only=True, slots=True)
class ApplyCommand:
    """What `opd mask apply` is told."""

    base: str = MISSING
    """Folder or hub id of the base."""
    delta: str = MISSING
    """File of `opd mask export`."""
    out: str = MISSING
    """Folder to write: the trained model."""


@dataclass(kw_only=True, slots=True)
class UndoCommand:
    """What `opd mask undo` is told."""

    trained: str = MISSING
    """Folder or hub id of the trained model, or the folder of a run."""
    delta: str = MISSING
    """File of `opd mask export`."""
    out: str = MISSING
    """Folder to write: the base."""


def add_delta_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The three verbs under ``opd mask``."""
    for name, run, command, help in (
        ("export", export, ExportCommand, "write what training changed as one small file"),
        ("apply", apply, ApplyCommand, "make the trained model from its base and that file"),
        ("undo", undo, UndoCommand, "make the base from the trained model and that file"),
    ):
        parser = verbs.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"Keys and their defaults:\n{explained(command)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        required = [field.name for field in fields(command) if field.default == MISSING]
        parser.usage = (
            f"opd mask {name} {' '.join(f'{key}=...' for key in required)} [KEY=VALUE ...]"
        )
        parser.set_defaults(run=run)


def export(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """``opd mask export base=A trained=B out=FILE [mask=] [dtype=] [format=] [others=]``."""
    told = typed(ExportCommand, rest)
    out = Path(told.out)
    if told.format == Format.shira:
        from opd.delta.rebuild import require_free
        from opd.delta.shira import export_shira

        require_free(out)
        with tempfile.TemporaryDirectory() as folder:
            base, delta = _exported(told, Path(folder) / "delta.safetensors", rest)
            adapter = export_shira(base, delta, out, told.others)
        _tell_adapter(adapter, out)
        return
    if told.others != Others.refuse:
        raise ValueError("others= is for format=shira only: leave it out")
    if out.suffix != ".safetensors":
        raise ValueError(f"out={out} should be a file: name one that ends in .safetensors")
    if out.exists():
        raise ValueError(f"out={out} is there already: name a new file, or remove it")
    base, delta = _exported(told, out, rest)
    dense = sum(stored.numel * stored.dtype.itemsize for stored in base.values())
    size = out.stat().st_size
    print(
        f"{delta.count:,} of {base.numel:,} weights changed ({delta.density:.4%}), in "
        f"{len(delta.changed)} of {len(base)} tensors\n"
        f"{out}: {size:,} bytes, {size / max(dense, 1):.2%} of the model's {dense:,}"
    )


def apply(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """``opd mask apply base=A delta=FILE out=FOLDER``."""
    from opd.delta.format import Side, read_delta
    from opd.delta.rebuild import write_trained
    from opd.checkpoint.tensors import open_checkpoint

    told = typed(ApplyCommand, rest)
    delta = read_delta(Path(told.delta))
    write_trained(open_checkpoint(told.base), delta, Path(told.out))
    _tell_rebuilt(delta, Side.trained, told.out)


def undo(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """``opd mask undo trained=B delta=FILE out=FOLDER``."""
    from opd.delta.format import Side, read_delta
    from opd.delta.rebuild import write_base
    from opd.checkpoint.tensors import open_checkpoint

    told = typed(UndoCommand, rest)
    delta = read_delta(Path(told.delta))
    write_base(open_checkpoint(final_model(told.trained)), delta, Path(told.out))
    _tell_rebuilt(delta, Side.base, told.out)


def _exported(told: ExportCommand, out: Path, rest: Sequence[str]) -> "tuple[Checkpoint, Delta]":
    import torch

    from opd.delta.format import cast, export_delta
    from opd.mask.mask import read_mask
    from opd.checkpoint.tensors import open_checkpoint

    base, trained = open_checkpoint(told.base), open_checkpoint(final_model(told.trained))
    if told.dtype != CastTo.stored:
        trained = cast(trained, getattr(torch, told.dtype.value))
    mask = None if told.mask is None else read_mask(Path(told.mask))
    command = shlex.join(["opd", "mask", "export", *rest])
    return base, export_delta(base, trained, out, mask=mask, command=command)


def final_model(model: str) -> str:
    """The model of a run's folder; any other name as it is."""
    folder = Path(model)
    if not (folder / "metrics.jsonl").is_file() and not (folder / "final").is_dir():
        return model
    if not (folder / "final" / "config.json").is_file():
        raise ValueError(
            f"the run {model} has no final/ yet: let it finish, or name the folder of a model"
        )
    return str(folder / "final")


def _tell_rebuilt(delta: "Delta", side: StrEnum, out: str) -> None:
    from opd.delta.format import Side

    end = delta.ends[Side(side)]
    print(f"{out} is {end.model} bit for bit (fingerprint {end.fingerprint[:12]})")


def _tell_adapter(adapter: "Adapter", out: Path) -> None:
    for name, reason in adapter.left_out.items():
        print(f"opd: warning: left out {name}: {reason}", file=sys.stderr)
    print(
        f"{out}: a SHiRA adapter of r={adapter.rank}, {adapter.stored:,} values in "
        f"{len(adapter.linears)} Linears, {len(adapter.norms)} norm tensors whole; "
        f"{adapter.rounded:,} weights a rounding away from the trained ones"
    )
