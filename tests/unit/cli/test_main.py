"""The command line: help that fits a screen, former names, flags, exit statuses."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

import opd
from opd.cli.main import COMMANDS, run
from opd.cli.mask import VERBS
from opd.run.model_names import recipe_file
from opd.run.recipe import find_recipe
from tests.support.command import OPD, environment

MOST_LINES, MOST_COLUMNS = 40, 100
HELP_CALLS = [
    ["--help"],
    *([name, "--help"] for name in COMMANDS),
    *(["mask", verb, "--help"] for verb in VERBS),
]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that ends with status 0."""
    try:
        status = run(arguments)
    except SystemExit as left:  # the help was shown
        status = left.code
    output = capsys.readouterr()
    assert status == 0, output.err
    assert output.err == ""
    return output.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("arguments", HELP_CALLS, ids=" ".join)
def test_help_fits_a_screen_and_has_one_example(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, *arguments)
    lines = text.rstrip("\n").split("\n")
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= MOST_COLUMNS
    assert lines[0].startswith("usage: opd ")
    (example,) = [line for line in lines if line.startswith("example: opd ")]
    assert text.count("example:") == 1
    command = arguments[:-1]
    assert example.split()[2 : 2 + len(command)] == command


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_the_help_of_opd_lists_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, flag)
    assert text == printed(capsys)
    for name, command in COMMANDS.items():
        assert f"  {name:10} {command.summary}\n" in text


def test_the_help_of_mask_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "mask", "--help")
    for verb in VERBS:
        assert f"\n  {verb} " in text


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"opd {opd.__version__}\n"
    assert importlib.metadata.version("opd") == opd.__version__


def test_a_former_command_is_refused_with_the_present_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refused(capsys, "write", "quickstart", "out=x.jsonl") == (
        "opd: opd write is now called opd generate: use that name\n"
    )


def test_an_unknown_command_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    complaint = refused(capsys, "trian", "quickstart")
    assert "trian" in complaint
    assert ", ".join(COMMANDS) in complaint
    assert ", ".join(VERBS) in refused(capsys, "mask", "discovr")


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "quickstart", "--model", "X"],
        ["eval", "quickstart", "--model=X"],
        ["generate", "quickstart", "--model", "X"],
        ["teacher", "--model", "X"],
        ["train", "quickstart", "--model", "X"],
    ],
    ids=" ".join,
)
def test_an_option_is_refused_because_settings_are_written_key_value(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    complaint = refused(capsys, *arguments)
    option = next(argument for argument in arguments if argument.startswith("--"))
    assert complaint.startswith(
        f"opd: unknown option {option}: settings are written key=value, as model=..."
    )


def test_a_missing_or_surplus_argument_is_answered_with_the_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refused(capsys, "train") == (
        "opd: RECIPE is missing: usage: opd train RECIPE [key=value ...] [-m] [--cfg]\n"
    )
    assert "unexpected argument two: usage: opd doctor" in refused(capsys, "doctor", "one", "two")
    assert "RUN is missing: usage: opd report" in refused(capsys, "report", "out=x")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device", "runs/x/metrics.jsonl"),
         "runs/x/metrics.jsonl: No space left on device"),
        (PermissionError(13, "Permission denied", "a", None, "b"), "a and b: Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (ConnectionError("the teacher\ndoes not answer"), "the teacher does not answer"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_is_one_sentence(
    error: OSError,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr("opd.cli.main._run", fail)
    assert run(["train", "quickstart"]) == 1
    assert capsys.readouterr().err == f"opd: {sentence}\n"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("launch.deepspeed=/no/such.json", "cannot be read (No such file or directory)"),
        ("launch.deepspeed=/tmp", "cannot be read (Is a directory)"),
        ('run.name="a\\x1b[31mb"', "run.name='a\\x1b[31mb': allowed are printable characters"),
        ('run.name=" "', "run.name=' ': allowed are printable characters"),
    ],
)
def test_files_and_names_of_a_run_are_checked(
    override: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    override = override.encode().decode("unicode_escape")
    assert sentence in refused(capsys, "train", "quickstart", "dry_run=true", override)


def test_a_teacher_server_prints_its_address(tmp_path: Path) -> None:
    model = find_recipe("quickstart").parent / "quickstart" / "teacher"
    server = subprocess.Popen(
        [*OPD, "teacher", f"model={model}", "backend=torch", "port=0"],
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=tmp_path,
        text=True,
    )
    assert server.stderr is not None
    address = next((line for line in server.stderr if "ready on http://127.0.0.1:" in line), "")
    server.terminate()
    server.communicate()
    assert int(address.rsplit(":", 1)[1]) > 0


@pytest.mark.parametrize("part", ["", "final", "checkpoints/step_000002"])
def test_a_model_of_a_run_has_the_settings_of_the_run(part: str, tmp_path: Path) -> None:
    run_folder = tmp_path / "x"
    (run_folder / part).mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run_folder / name).touch()
    assert recipe_file(str(run_folder / part)) == run_folder / "config.yaml"
    assert recipe_file(str(tmp_path)) is None


@pytest.mark.parametrize("model", [[], ["model=recipes/quickstart/student"]])
def test_eval_needs_a_recipe_or_a_model_of_a_run(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", *model]) == 2
    assert "RECIPE is missing, and model= is of no run" in capsys.readouterr().err
