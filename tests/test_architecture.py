"""Floors hold, heavy imports stay at home, light modules are light, code keeps its size and its words."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "opd"
HEAVY = {"torch", "vllm", "transformers", "deepspeed"}

LAZY_IMPORTS = {
    ("cli/analyze.py", "opd.analysis.formatting"),
    ("cli/analyze.py", "opd.cli.prune"),
    ("cli/analyze.py", "opd.run.analyze"),
    ("cli/analyze.py", "opd.run.prune"),
    ("cli/doctor.py", "opd.run.doctor"),
    ("cli/export.py", "opd.run.export"),
    ("cli/evaluate.py", "opd.run.evaluate"),
    ("cli/generate.py", "opd.run.generate"),
    ("cli/plan.py", "opd.run"),
    ("cli/report.py", "opd.run.train"),
    ("cli/rollout.py", "opd.run"),
    ("cli/teacher.py", "opd.run"),
    ("cli/train.py", "opd.run"),
    ("run/train.py", "opd.run.worker"),
}
"""Imports inside functions, so that --help needs no torch and the launcher loads no model code."""
MOST_LAZY = 0.05
MOST_FUNCTION_LINES, MOST_FILE_LINES, MOST_REEXPORT_LINES = 60, 300, 40
IMPORT_SECONDS = 0.2
PRIVATE_WORDS = {"said", "told", "asked"}


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module of opd, by its path inside the package."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(tree: ast.AST) -> Iterator[str]:
    """The module that each import statement names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def is_of(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_every_import_contract_is_kept() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "opd",
        "opd.config.schema",
        "opd.types",
        "opd.interfaces",
        "opd.cli.main",
        *(
            f"opd.cli.{name}"
            for name in (
                "train",
                "doctor",
                "plan",
                "evaluate",
                "generate",
                "report",
                "teacher",
                "rollout",
            )
        ),
    ],
)
def test_a_light_module_needs_no_heavy_package(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert loaded & HEAVY == set()


def test_importing_opd_is_fast() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import opd"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    # "import time: self [us] | cumulative | imported package"
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines()]
    microseconds = {name.strip(): total.strip() for _, total, name in rows}
    assert int(microseconds["opd"]) < IMPORT_SECONDS * 1e6
    assert not any(is_of("torch", name) for name in microseconds)


def test_the_launcher_builds_nothing() -> None:
    loaded = loaded_by("import opd.run.train")
    assert "opd.run.train" in loaded
    assert not [name for name in loaded if is_of("opd.assembly", name)]
    assert loaded & {"vllm", "deepspeed"} == set()


def test_torch_distributed_stays_in_world_and_sync() -> None:
    allowed = {"world.py"}
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "torch.distributed" in path.read_text()
    }
    assert {u for u in users if not u.startswith("sync/")} <= allowed


def test_hydra_stays_in_the_recipe_and_the_schema() -> None:
    users = {
        path for path, tree in modules().items() if any(is_of("hydra", m) for m in imported(tree))
    }
    assert users == {"run/recipe.py", "config/schema.py"}


def test_imports_inside_functions_are_few_and_listed() -> None:
    found = [
        (path, module)
        for path, tree in modules().items()
        for function in functions(tree)
        for module in imported(function)
        if is_of("opd", module)
    ]
    assert {path.split("/")[0] for path, _ in found} <= {"cli", "run"}
    assert set(found) == LAZY_IMPORTS
    internal = [m for tree in modules().values() for m in imported(tree) if is_of("opd", m)]
    assert len(found) < MOST_LAZY * len(internal)


def test_modules_are_imported_by_name_only_where_names_are_looked_up() -> None:
    users = {
        path
        for path, tree in modules().items()
        if any(is_of("importlib", module) for module in imported(tree))
        and "import_module(" in (PACKAGE / path).read_text()
    }
    assert users == {"__init__.py", "cli/main.py", "config/functions.py"}


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{path}:{function.name}": lines
        for path, tree in modules().items()
        for function in functions(tree)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MOST_FUNCTION_LINES
    }
    assert long == {}


def test_no_file_is_longer_than_five_screens() -> None:
    lengths = {path: len((PACKAGE / path).read_text().splitlines()) for path in modules()}
    assert {path: n for path, n in lengths.items() if n > MOST_FILE_LINES} == {}


def test_no_two_classes_share_a_name() -> None:
    names = Counter(
        node.name
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_long_module_only_passes_names_on() -> None:
    def defines(tree: ast.Module) -> bool:
        return any(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Call) for node in ast.walk(tree)
        )

    passing_on = [
        path
        for path, tree in modules().items()
        if not defines(tree)
        and len((PACKAGE / path).read_text().splitlines()) > MOST_REEXPORT_LINES
    ]
    assert passing_on == []


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a module gives, with its line: variables, arguments, attributes, definitions."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name):
                yield node.lineno, name


@pytest.mark.parametrize("room", sorted({path.split("/")[0] for path in modules()}))
def test_no_identifier_is_private_language(room: str) -> None:
    found = [
        f"{path}:{line} {name}"
        for path, tree in modules().items()
        if path.split("/")[0] == room
        for line, name in identifiers(tree)
        if PRIVATE_WORDS & set(name.lower().split("_"))
    ]
    assert found == []


@pytest.mark.parametrize("room", sorted({path.split("/")[0] for path in modules()}))
def test_a_function_is_named_by_a_verb_and_not_as_something_of(room: str) -> None:
    found = [
        f"{path}:{function.lineno} {function.name}"
        for path, tree in modules().items()
        if path.split("/")[0] == room
        for function in functions(tree)
        if function.name.endswith("_of")
    ]
    assert found == []


def test_the_configuration_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make_configuration.py", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_unit_tests_mirror_the_package() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    folders = {path.name for path in (REPOSITORY / "tests" / "unit").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} <= rooms
    assert len(folders) > 10


def test_test_modules_are_imported_by_their_path() -> None:
    """Two may then share a file name, and a helper is imported in one way only."""
    options = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]
    assert "--import-mode=importlib" in options["ini_options"]["addopts"].split()
    tests = REPOSITORY / "tests"
    assert list(tests.rglob("__init__.py")) == []
    edits = "sys" + ".path"
    assert [p for p in tests.rglob("*.py") if edits in p.read_text()] == []
