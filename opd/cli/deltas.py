"""``opd mask export | apply | undo``: a trained subnetwork as a small file, and back."""

import argparse
import difflib
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from opd.mask.delta import Delta
    from opd.mask.shira import Adapter
    from opd.tensors import Checkpoint

Choice = TypeVar("Choice", bound=StrEnum)


class Format(StrEnum):
    """How a trained subnetwork is written."""

    delta = "delta"
    shira = "shira"


class CastTo(StrEnum):
    """Number formats that trained weights can be rounded to before they are compared."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


EXPORT = {
    "base": "folder or hub id of the model that training started from",
    "trained": "folder or hub id of the trained model, or the folder of a run (its final/ is meant)",
    "out": "file to write (format=shira: folder)",
    "mask": "mask file; refuse when a weight outside it changed",
    "dtype": f"round the trained weights to it first: {', '.join(CastTo)}",
    "format": "delta (default): one file, exact both ways; shira: an adapter that PEFT loads",
    "others": "format=shira: refuse (default) or drop what such an adapter cannot hold",
}
APPLY = {
    "base": "folder or hub id of the base",
    "delta": "file of `opd mask export`",
    "out": "folder to write: the trained model",
}
UNDO = {
    "trained": "folder or hub id of the trained model, or the folder of a run",
    "delta": "file of `opd mask export`",
    "out": "folder to write: the base",
}


def add_delta_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The three verbs under ``opd mask``."""
    for name, run, settings, optional, help in (
        ("export", export, EXPORT, 4, "write what training changed as one small file"),
        ("apply", apply, APPLY, 0, "make the trained model from its base and that file"),
        ("undo", undo, UNDO, 0, "make the base from the trained model and that file"),
    ):
        words = [
            f"{key}=..." if i < len(settings) - optional else f"[{key}=...]"
            for i, key in enumerate(settings)
        ]
        parser = verbs.add_parser(
            name,
            help=help,
            description=help,
            usage=f"opd mask {name} {' '.join(words)}",
            epilog="\n".join(f"{key + '=':9} {meaning}" for key, meaning in settings.items()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=run)


def export(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """``opd mask export base=A trained=B out=FILE [mask=] [dtype=] [format=] [others=]``."""
    given = _settings(rest, EXPORT, required=("base", "trained", "out"))
    format = _choice(given, "format", Format, Format.delta)
    out = Path(given["out"])
    if format == Format.shira:
        from opd.mask.rebuild import require_free
        from opd.mask.shira import Others, export_shira

        require_free(out)
        others = _choice(given, "others", Others, Others.refuse)
        with tempfile.TemporaryDirectory() as folder:
            base, delta = _exported(given, Path(folder) / "delta.safetensors", rest)
            adapter = export_shira(base, delta, out, others)
        _tell_adapter(adapter, out)
        return
    if "others" in given:
        raise ValueError("others= is for format=shira only: leave it out")
    if out.suffix != ".safetensors":
        raise ValueError(f"out={out} should be a file: name one that ends in .safetensors")
    if out.exists():
        raise ValueError(f"out={out} is there already: name a new file, or remove it")
    base, delta = _exported(given, out, rest)
    dense = sum(stored.numel * stored.dtype.itemsize for stored in base.values())
    size = out.stat().st_size
    print(
        f"{delta.count:,} of {base.numel:,} weights changed ({delta.density:.4%}), in "
        f"{len(delta.changed)} of {len(base)} tensors\n"
        f"{out}: {size:,} bytes, {size / max(dense, 1):.2%} of the model's {dense:,}"
    )


def apply(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """``opd mask apply base=A delta=FILE out=FOLDER``."""
    from opd.mask.delta import Side, read_delta
    from opd.mask.rebuild import write_trained
    from opd.tensors import open_checkpoint

    given = _settings(rest, APPLY, required=tuple(APPLY))
    delta = read_delta(Path(given["delta"]))
    write_trained(open_checkpoint(given["base"]), delta, Path(given["out"]))
    _tell_rebuilt(delta, Side.trained, given["out"])


def undo(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """``opd mask undo trained=B delta=FILE out=FOLDER``."""
    from opd.mask.delta import Side, read_delta
    from opd.mask.rebuild import write_base
    from opd.tensors import open_checkpoint

    given = _settings(rest, UNDO, required=tuple(UNDO))
    delta = read_delta(Path(given["delta"]))
    write_base(open_checkpoint(final_model(given["trained"])), delta, Path(given["out"]))
    _tell_rebuilt(delta, Side.base, given["out"])


def _exported(
    given: Mapping[str, str], out: Path, rest: Sequence[str]
) -> "tuple[Checkpoint, Delta]":
    import torch

    from opd.mask.delta import cast, export_delta
    from opd.mask.mask import read_mask
    from opd.tensors import open_checkpoint

    base, trained = open_checkpoint(given["base"]), open_checkpoint(final_model(given["trained"]))
    if "dtype" in given:
        to = {
            CastTo.bfloat16: torch.bfloat16,
            CastTo.float16: torch.float16,
            CastTo.float32: torch.float32,
        }[_choice(given, "dtype", CastTo, CastTo.bfloat16)]
        trained = cast(trained, to)
    mask = read_mask(Path(given["mask"])) if "mask" in given else None
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
    from opd.mask.delta import Side

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


def _settings(
    rest: Sequence[str], known: Mapping[str, str], required: Sequence[str]
) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals or not value or key not in known:
            near = difflib.get_close_matches(key.lstrip("-"), known, n=1)
            meant = f"did you mean {near[0]}=...? " if near else ""
            raise ValueError(
                f"found {word}: {meant}allowed are {', '.join(f'{k}=...' for k in known)}"
            )
        if key in given:
            raise ValueError(f"{key}= is given twice: {given[key]} and {value}; choose one")
        given[key] = value
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"{missing[0]}=... is missing: {known[missing[0]]}")
    return given


def _choice(
    given: Mapping[str, str], key: str, choices: Callable[[str], Choice], default: Choice
) -> Choice:
    value = given.get(key, default)
    try:
        return choices(value)
    except ValueError:
        allowed = ", ".join(type(default))
        raise ValueError(f"found {key}={value}: allowed are {allowed}") from None
