"""The command ``opd``: train, eval, teacher, rollout, mask, analyze, prune, report, doctor."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from opd.cli.analyze import add_analyze_command
from opd.cli.mask import add_mask_commands
from opd.run.worker import DONE, FAILED, MISTAKE

RECIPE_HELP = "path of a recipe, or the name of one that came with opd"
OVERRIDES_HELP = "settings as in Hydra: loss=jsd optim.lr=1e-4; see docs/configuration.md"


def main() -> None:
    """Entry point. Exit status 0: done; 2: the user's mistake, said in a sentence; 1: anything else."""
    warnings.filterwarnings("ignore", message=".*hydra.searchpath.*")
    sys.exit(_answer(sys.argv[1:]))


def _answer(arguments: Sequence[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, instead of printing and exiting with 1
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from opd.run.launch import WorkerFailed
    from opd.run.recipe_errors import sentence

    try:
        parsed, rest = _parser().parse_known_args(arguments)
        parsed.run(parsed, rest)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        print(f"opd: {sentence(error)}", file=sys.stderr)
        return MISTAKE
    except (WorkerFailed, ConnectionError) as error:
        print(f"opd: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(
            "opd: interrupted; the same command goes on from the last checkpoint", file=sys.stderr
        )
        return FAILED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opd",
        description="On-policy distillation: a student writes, a teacher scores every token, the "
        "student learns.",
        epilog="Exit status: 0 done, 2 a mistake of the user's, 1 anything else.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _recipe_command(
        commands, "train", _train, "train a student from a teacher; resumes a run that is there"
    )
    train.add_argument(
        "-m", "--multirun", action="store_true", help="run every combination of a=1,2 b=3,4"
    )
    train.add_argument(
        "--cfg", action="store_true", help="print the composed configuration and stop"
    )
    _recipe_command(commands, "doctor", _doctor, "check a recipe before it costs anything")
    evaluate = _recipe_command(commands, "eval", _eval, "examine a checkpoint without training")
    evaluate.add_argument("--model", help="folder or hub id (default: the recipe's student)")
    evaluate.add_argument("--out", help="JSON file for metrics and transcripts")
    write = _recipe_command(
        commands,
        "write",
        _write,
        "let a model answer the training prompts; the answers are a data set",
    )
    write.add_argument("--model", help="folder or hub id (default: the recipe's teacher)")
    write.add_argument("--out", required=True, help="JSON lines, for data.train")
    write.add_argument(
        "--right-only", action="store_true", help="keep what the recipe's grader finds right"
    )
    _server_command(
        commands, "teacher", _teacher, "serve a teacher over HTTP (--help lists its options)"
    )
    _server_command(
        commands, "rollout", _rollout, "generate over HTTP for a run (--help lists its options)"
    )
    add_mask_commands(commands)
    add_analyze_command(commands)
    prune = commands.add_parser(
        "prune", help="take back part of what training moved, and examine what is left"
    )
    prune.usage = "opd prune base=MODEL trained=RUN recipe=RECIPE out=DIR [KEY=VALUE ...]"
    prune.set_defaults(run=_prune)
    report = commands.add_parser("report", help="put runs side by side: one page and a csv")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    report.add_argument(
        "--out", default=".", help="folder for comparison.html and comparison.csv (default: here)"
    )
    report.set_defaults(run=_report)
    return parser


def _recipe_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace, list[str]], None],
    help: str,
) -> argparse.ArgumentParser:
    from opd.run.recipe import packaged_recipes

    parser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"KEY=VALUE are {OVERRIDES_HELP}. Recipes: {', '.join(sorted(packaged_recipes()))}.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    parser.usage = f"opd {name} RECIPE [KEY=VALUE ...] [options]"
    parser.set_defaults(run=run)
    return parser


def _server_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace, list[str]], None],
    help: str,
) -> None:
    parser = commands.add_parser(name, help=help, add_help=False)
    parser.set_defaults(run=run)


def _overrides(rest: Sequence[str]) -> list[str]:
    wrong = [word for word in rest if word.startswith("-")]
    if wrong:
        raise ValueError(f"unknown option {wrong[0]}: see opd --help")
    return list(rest)


def _train(parsed: argparse.Namespace, rest: list[str]) -> None:
    from opd.run.train import print_config, train

    if parsed.cfg:
        print_config(parsed.recipe, _overrides(rest))
    else:
        train(parsed.recipe, _overrides(rest), multirun=parsed.multirun)


def _doctor(parsed: argparse.Namespace, rest: list[str]) -> None:
    from opd.run.train import doctor

    doctor(parsed.recipe, _overrides(rest))


def _eval(parsed: argparse.Namespace, rest: list[str]) -> None:
    from opd.run.recipe import composed, find_recipe
    from opd.run.evaluate import run_eval
    from opd.run.launch import restart_keeping_memory

    restart_keeping_memory()
    recipe = composed(find_recipe(parsed.recipe), _overrides(rest))
    run_eval(recipe, model=parsed.model, out=parsed.out)


def _write(parsed: argparse.Namespace, rest: list[str]) -> None:
    from opd.run.recipe import composed, find_recipe
    from opd.run.launch import restart_keeping_memory
    from opd.run.generate import write

    restart_keeping_memory()
    recipe = composed(find_recipe(parsed.recipe), _overrides(rest))
    counts = write(recipe, model=parsed.model, out=parsed.out, right_only=parsed.right_only)
    print(", ".join(f"{name} {count}" for name, count in counts.items()), f"-> {parsed.out}")


def _teacher(parsed: argparse.Namespace, rest: list[str]) -> None:
    from opd.teacher.options import parse
    from opd.teacher.server import main as serve

    serve(parse(rest))


def _rollout(parsed: argparse.Namespace, rest: list[str]) -> None:
    from opd.run.serve import main as serve
    from opd.rollout.options import RolloutServerOptions
    from opd.serving.options import parse_options

    serve(parse_options(RolloutServerOptions, "opd rollout", rest))


def _prune(parsed: argparse.Namespace, rest: list[str]) -> None:
    from opd.run.prune import asked, print_curves, prune

    print_curves(prune(asked(_overrides(rest))))


def _report(parsed: argparse.Namespace, rest: list[str]) -> None:
    from opd.run.train import print_comparison

    if _overrides(rest):
        raise ValueError(f"unknown argument {rest[0]}: see opd report --help")
    print_comparison([Path(run) for run in parsed.runs], Path(parsed.out))


if __name__ == "__main__":
    main()
