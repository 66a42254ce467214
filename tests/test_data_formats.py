"""Every example row of docs/data.md is read with the settings beside it, and trained on."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from transformers import AutoTokenizer

from opd.data.preview import preview
from opd.data.prompt_sets import read_prompt_sets
from opd.data.stream import ShuffledPrompts
from opd.data.tokenizer import read_student_tokenizer
from opd.run.recipe import Recipe, composed, find_recipe
from tests.support.command import SMALL, opd

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "data.md").read_text()
ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| `(?P<row>\{.*\})` \| `(?P<settings>data\.train=.*)` \|$", re.M
)
FORMATS = {found["name"]: found for found in ROW.finditer(PAGE)}
MIXTURES = [
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(data:.*?)```", PAGE, re.DOTALL)
]
CHAT = (
    "{% if tools %}{{ tools | length }}*{% endif %}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'system' %};{% elif m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A template of the quickstart's few characters."""
ALONE = [
    "rollout=transformers", "teacher=local", "launch.engine=torch", "launch.processes=1",
    "data.eval=null", "train.prompts_per_step=1", "data.chat_template=chat.jinja",
]  # fmt: skip
WITHOUT_ANSWER = ("TRL, conversational", "TRL, prompt-completion", "TRL, with tools")
COPIES = 3
"""Rows of each example file; they differ in the second number."""


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(text.replace("12+7=", f"12+{7 + i}=")) for i in range(COPIES)]


def write(name: str, given: list[dict[str, Any]]) -> None:
    """Write rows as the project of the format does, by the name that data.train has."""
    path = Path(name)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in given))
        case ".json":
            path.write_text(json.dumps(given, indent=1))
        case ".csv":
            pandas.DataFrame(given).to_csv(path, index=False)
        case ".parquet":
            datasets.Dataset.from_list(given).to_parquet(path)
        case _:
            _write_folder(path, given)


def _write_folder(path: Path, given: list[dict[str, Any]]) -> None:
    made = datasets.Dataset.from_list(given)
    if path.name == "saved":
        made.save_to_disk(path)
    elif path.name == "splits":
        datasets.DatasetDict({"validation": made, "test": made.select([0])}).save_to_disk(path)
    else:  # what the hub holds: data files and a card that names the subsets
        path.mkdir(parents=True)
        made.to_parquet(path / "main.parquet")
        card = {"configs": [{"config_name": "main", "data_files": "main.parquet"}]}
        (path / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page."""
    folder = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("chat.jinja").write_text(CHAT)
        for found in FORMATS.values():
            name = overrides(found["settings"])["data.train"]
            write(name, rows(found["row"]))
        write("part-0.jsonl", rows('{"prompt": "12+7=", "answer": "19"}'))
        write("part-1.jsonl", rows('{"prompt": "12+7=", "answer": "19"}'))
    return folder


@pytest.fixture
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def overrides(settings: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(settings))


def recipe(*given: str) -> Recipe:
    return composed(find_recipe("quickstart"), [*ALONE, *given])


def read(*given: str):
    config = recipe(*given).config
    student = read_student_tokenizer(config.student, config.data.chat_template)
    return read_prompt_sets(config, student)


def test_the_page_has_an_example_of_each_format() -> None:
    assert len(FORMATS) == 16
    assert len(MIXTURES) == 2
    for word in ("verl", "slime", "ms-swift", "TRL, prompt-only", "save_to_disk", "parts", "tools"):
        assert any(word in name for name in FORMATS), word


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize("name", FORMATS)
def test_an_example_row_is_read_with_the_settings_beside_it(name: str) -> None:
    found = FORMATS[name]
    sets = read(*shlex.split(found["settings"]))
    assert len(sets.train) == COPIES
    for i, prompt in enumerate(sets.train):
        assert prompt.text.endswith(f"12+{7 + i}=")
        assert prompt.uid == str(i)
        assert prompt.answer == (None if name in WITHOUT_ANSWER else "19")
        if "method=offline" in found["settings"]:
            tokenizer = AutoTokenizer.from_pretrained(recipe().config.student.model)
            assert tokenizer.decode(prompt.completion_ids) == "#19<eos>"
        if "teacher_prompt" in found["row"]:
            assert prompt.teacher_ids is not None
            assert len(prompt.teacher_ids) == len(prompt.token_ids) + len("19#")
        if "tools" in found["row"]:
            assert prompt.text.startswith("1*")
        if "domain" in found["row"]:
            assert prompt.teacher == "math"


def test_the_first_prompt_of_the_page_is_what_the_doctor_shows() -> None:
    (words, shown) = re.findall(
        r"```\n\$ opd doctor quickstart ([^\n]*)\n(.*?)```", PAGE, re.DOTALL
    )[0]
    config = composed(find_recipe("quickstart"), [*shlex.split(words), "data.eval=null"]).config
    student = read_student_tokenizer(config.student)
    lines = preview(read_prompt_sets(config, student), student.tokenizer, teacher=True)
    assert "\n".join(lines) + "\n" == shown


@pytest.mark.usefixtures("_at_home")
def test_a_list_with_a_glob_of_the_page_is_read() -> None:
    sets = read(f"data.train={json.dumps(MIXTURES[0]['data']['train'])}")
    assert [prompt.uid for prompt in sets.train] == [
        *(f"0:{i}" for i in range(6)),
        "1:0",
        "1:1",
        "1:2",
    ]


@pytest.mark.usefixtures("_at_home")
def test_the_mixture_of_the_page_is_read_from_a_recipe_by_weight() -> None:
    own = yaml.safe_load((REPOSITORY / "recipes" / "quickstart.yaml").read_text()) | MIXTURES[1]
    models = REPOSITORY / "recipes" / "quickstart"
    own["student"]["model"], own["teacher"]["model"] = f"{models}/student", f"{models}/teacher"
    Path("mixed.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    config = composed(Path("mixed.yaml").resolve(), [*ALONE, "train.prompts_per_step=4"]).config
    sets = read_prompt_sets(
        config, read_student_tokenizer(config.student, config.data.chat_template)
    )
    assert [(group.size, group.weight) for group in sets.groups] == [(COPIES, 3.0), (COPIES, 1.0)]
    assert {prompt.answer for prompt in sets.train} == {"19"}
    batch = ShuffledPrompts(sets.train, 4, seed=0, groups=sets.groups).take(0)
    assert sorted(prompt.uid[0] for prompt in batch) == ["0", "0", "0", "1"]


def mixture(formats: list[str]) -> str:
    """An override of data.train with one entry of weight 1 for each format."""
    entries = []
    for name in formats:
        settings = overrides(FORMATS[name]["settings"])
        path = settings.pop("data.train")
        settings.pop("method", None)
        own = {key.removeprefix("data."): value for key, value in settings.items()}
        fields = {"path": path, "weight": "1", **own}
        entries.append("{" + ",".join(f"{k}: {v}" for k, v in fields.items()) + "}")
    return f"data.train=[{','.join(entries)}]"


@pytest.mark.parametrize("method", ["opd", "offline"])
def test_a_step_is_trained_on_one_row_of_each_format(method: str, home: Path) -> None:
    formats = [
        name
        for name, found in FORMATS.items()
        if ("method=offline" in found["settings"]) == (method == "offline")
        and "teacher_field" not in found["settings"]
    ]
    done = opd(
        "train", "quickstart", *SMALL, *ALONE, mixture(formats), f"method={method}", "train.steps=1",
        f"train.prompts_per_step={len(formats)}", f"run.dir=run_{method}", "eval.kl_prompts=0",
        cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (home / f"run_{method}" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 1
    assert last["tokens/trained"] >= len(formats)
    assert (home / f"run_{method}" / "final" / "chat_template.jinja").read_text() == CHAT


BAD: list[tuple[str, str, str]] = [
    ("rows.jsonl", '{"prompt": 3}', r"rows\.jsonl:2: found a prompt of type int"),
    ("rows.csv", '{"prompt": "", "answer": "1"}', r"rows\.csv:3: the prompt is empty"),
    (
        "verl.parquet",
        '{"prompt": [{"role": "user", "content": null}]}',
        r"verl\.parquet: row 2: message 1",
    ),
    ("rows.json", '{"question": "x"}', r"rows\.json: row 2: no field 'prompt'; found 'question'"),
    ("saved", '{"prompt": null}', r"saved: row 2: found a prompt of null"),
    (
        "parts.jsonl",
        '{"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}',
        r"parts\.jsonl:2: message 1 .*images and other media are not supported",
    ),
]


@pytest.mark.parametrize(("name", "row", "words"), BAD)
def test_a_bad_row_is_named_by_file_row_and_field(
    name: str, row: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chat.jinja").write_text(CHAT)
    bad = json.loads(row)
    fine: dict[str, Any] = {"prompt": "1+2="}
    if isinstance(bad.get("prompt"), list):
        fine = {"prompt": [{"role": "user", "content": "1+2="}]}
    if name.endswith(".csv"):
        fine["answer"] = "3"
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fine, bad]), name)
    else:
        write(name, [fine, bad])
    with pytest.raises(ValueError, match=words) as refused:
        read(f"data.train={name}")
    assert "\n" not in str(refused.value)
