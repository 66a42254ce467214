"""The pages of docs/ name what is there: metrics, links, code and command lines."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd.cli.main import COMMANDS
from opd.config import uld
from opd.config.loss import CHOICES as LOSSES
from opd.config.schema import problems
from opd.run.recipe import bundled_recipes, composed
from opd.types import DivergenceKind

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"])
GUIDES = [page for page in PAGES if page.parent in (DOCS, REPOSITORY)]
METRIC = re.compile(r"[a-z]+/[a-z]\w*")
NOT_INSTALLED = {"tensorboard"}
"""What a page tells the reader to install."""
EMITTERS = ("loop.py", "losses", "train", "sync", "schedule", "evaluate", "run/evaluate_apart.py")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def literals(path: Path) -> Iterator[str]:
    """The strings of a module; what an f-string computes is ``{}``. Docstrings are left out."""
    tree = ast.parse(path.read_text())
    parts = {part for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield node.value


def emitted_metrics() -> set[str]:
    """The metrics whose names stand in the code, and those that an f-string makes."""
    places = [REPOSITORY / "opd" / place for place in EMITTERS]
    files = [f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*.py")))]
    names = {text for file in files for text in literals(file) if METRIC.fullmatch(text)}
    kinds = {f"loss/{kind}" for kind in DivergenceKind}
    maxima = {"engine/logp_gap_max", "engine/ratio_max"}  # f"{name}_max" of both
    task = ("accuracy", "teacher_accuracy", "mean_at_k", "pass_at_J", "length", "truncated")
    return names | kinds | maxima | {f"eval/TASK/{name}" for name in (*task, "reverse_kl")}


def described_metrics() -> set[str]:
    page = (DOCS / "metrics.md").read_text()
    first_cells = re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE)
    return {name for cell in first_cells for name in re.findall(r"`([^`<]+)`", cell)}


def test_every_metric_is_described() -> None:
    assert sorted(emitted_metrics() - described_metrics()) == []


def test_every_described_metric_exists() -> None:
    assert sorted(described_metrics() - emitted_metrics()) == []


def test_the_evaluations_metrics_are_those_of_the_page() -> None:
    written = set(literals(REPOSITORY / "opd/evaluate/evaluator.py"))
    assert {
        "accuracy",
        "teacher_accuracy",
        "mean_at_k",
        "length",
        "truncated",
        "pass_at_{}",
    } <= written
    assert "reverse_kl" in set(literals(REPOSITORY / "opd/evaluate/divergence.py"))


def test_losses_are_described() -> None:
    page = (DOCS / "losses.md").read_text()
    row = re.search(r"^\| `loss` \| (.*?) \|", page, re.MULTILINE)
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row[1])) == {*LOSSES, *uld.CHOICES}
    table = page.split("## Divergences")[1].split("##")[0]
    assert [k for k in DivergenceKind if f"| `{k}` |" not in table] == []


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives to the headings of a page."""
    prose = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            dead.append(link)
    assert dead == []


def test_every_page_is_in_the_index() -> None:
    linked = set(LINK.findall((DOCS / "index.md").read_text()))
    assert sorted({p.name for p in DOCS.glob("*.md")} - linked - {"index.md"}) == []


SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in GUIDES
    for number, (language, code) in enumerate(FENCE.findall(page.read_text()))
    if language == "python"
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_of_the_pages_compiles_and_its_imports_exist(code: str) -> None:
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), "snippet", "exec"), {})
            except ModuleNotFoundError as error:
                if error.name not in NOT_INSTALLED:
                    raise


def test_the_rewards_of_the_page_do_what_they_say() -> None:
    found: dict[str, Any] = {}
    (code,) = (c for language, c in FENCE.findall((DOCS / "rewards.md").read_text()) if language)
    exec(compile(code, "rewards.md", "exec"), found)
    assert found["digits_right"]("1+2=3#124", "123") == pytest.approx(2 / 3)
    assert [found["valid_json"](text, "a,b") for text in ("{", '{"a": 1}', '{"a": 1, "b": 2}')] == [
        0,
        1,
        2,
    ]
    assert found["brief"]("#12", "12") > found["brief"]("1#12", "12") > found["brief"]("#13", "12")


def test_the_recipe_of_the_page_composes(tmp_path: Path) -> None:
    code = next(
        c for language, c in FENCE.findall((DOCS / "recipes.md").read_text()) if language == "yaml"
    )
    (tmp_path / "mine.yaml").write_text(code)
    adamw, sgd = (composed(tmp_path / "mine.yaml", [f"optim={o}"]).config for o in ("adamw", "sgd"))
    assert (adamw.optim.lr, sgd.optim.lr) == (1e-5, 1e-2)
    assert adamw.data.train == str(tmp_path / "prompts.jsonl")


def test_the_recipe_of_the_page_that_builds_on_another_composes(tmp_path: Path) -> None:
    blocks = [
        c for language, c in FENCE.findall((DOCS / "recipes.md").read_text()) if language == "yaml"
    ]
    (code,) = (block for block in blocks if "[quickstart, _self_]" in block)
    (tmp_path / "mine.yaml").write_text(code)
    config = composed(tmp_path / "mine.yaml", []).config
    assert (config.train.steps, config.train.prompts_per_step) == (20, 64)
    assert Path(config.data.train).exists()


def command_lines() -> Iterator[str]:
    """Lines that begin with ``opd`` in the code blocks of the pages, without comments."""
    for page in GUIDES:
        text = page.read_text()
        blocks = [code for language, code in FENCE.findall(text) if language in ("", "bash", "sh")]
        indented = re.findall(r"^    (opd .*)$", text, re.MULTILINE)
        for block in [*blocks, *indented]:
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(\$ )?opd \w", line):
                    yield line.removeprefix("$ ")


LINES = sorted(set(command_lines()))


def test_commands_of_the_pages_exist() -> None:
    words = [shlex.split(line, comments=True) for line in LINES]
    assert len(words) > 30
    assert sorted({w[1] for w in words} - set(COMMANDS)) == []


TRAINED = [
    line
    for line in LINES
    if shlex.split(line, comments=True)[1] == "train" and line.split()[2] in bundled_recipes()
]


@pytest.mark.parametrize("line", TRAINED)
def test_training_commands_of_the_pages_compose(line: str) -> None:
    _, _, name, *rest = shlex.split(line, comments=True)
    if any("(" in w or w == "..." or not ("=" in w or w == "-m") for w in rest):
        pytest.skip("alternatives in words")
    settings = [setting for setting in rest if setting != "-m"]
    if "-m" in rest:  # the first value of each
        settings = [s if "[" in s or "'" in s else s.split(",")[0] for s in settings]
    assert problems(composed(bundled_recipes()[name], settings).config) == []
