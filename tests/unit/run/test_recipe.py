"""Recipes build on the bundled defaults whatever files are called; a job of a sweep has its own name."""

from pathlib import Path

import pytest

from opd.config.reward import FunctionRewardConfig
from opd.run.folder import describe
from opd.run.recipe import Recipe, composed, find_recipe, job_name, load_recipe, sweep

OWN = """defaults: [base, {override teacher: local}, _self_]
student: {model: student}
teacher: {model: teacher}
data: {train: rows.jsonl}
optim: {lr: 1e-4}
"""
NAMES = ("base.yaml", "schema.yaml", "opd_schema.yml", "opd recipe.yaml", "method.yaml")


@pytest.fixture
def _names_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's mine, a=b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in (*NAMES, "mine.yaml"):
        Path(name).write_text(OWN)


@pytest.mark.usefixtures("_names_of_ours")
@pytest.mark.parametrize("name", [*NAMES, "mine.yaml"])
def test_a_recipe_may_be_called_as_ours_and_lie_beside_such_a_file(name: str) -> None:
    recipe = composed(find_recipe(name), ["optim.lr=2e-4"])
    assert recipe.config.run.name == Path(name).stem
    assert (recipe.config.student.model, recipe.config.optim.lr) == ("student", 2e-4)
    assert recipe.choices["optim"] == "adamw"


@pytest.mark.usefixtures("_names_of_ours")
def test_a_recipe_builds_on_another_one_beside_it() -> None:
    Path("child.yaml").write_text("defaults: [mine, _self_]\ntrain: {steps: 7}\n")
    config = composed(find_recipe("child.yaml"), []).config
    assert (config.train.steps, config.student.model) == (7, "student")


def test_a_recipe_builds_on_a_bundled_one_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [quickstart, {override loss: jsd}, _self_]\ntrain: {steps: 7}\n"
    )
    mine, bundled = composed(tmp_path / "mine.yaml", []), load_recipe("quickstart")
    assert (mine.config.train.steps, mine.choices["loss"]) == (7, "jsd")
    assert mine.config.run.name == "mine"
    assert mine.config.student.model == bundled.config.student.model
    assert Path(mine.config.student.model).is_dir()
    rates: list[tuple[float, str]] = []

    def job(recipe: Recipe, _: str) -> None:
        rates.append((recipe.config.optim.lr, str(recipe.config.data.train)))

    sweep(tmp_path / "mine.yaml", ["optim.lr=1e-3,1e-2"], job)
    assert rates == [(lr, bundled.config.data.train) for lr in (1e-3, 1e-2)]


@pytest.mark.usefixtures("_names_of_ours")
@pytest.mark.parametrize("name", ["base.yaml", "mine.yaml"])
def test_a_sweep_of_a_recipe_called_as_ours_runs_each_job(name: str) -> None:
    rates: list[float] = []

    def job(recipe: Recipe, _: str) -> None:
        rates.append(recipe.config.optim.lr)

    sweep(find_recipe(name), ["optim.lr=1e-3,1e-2"], job)
    assert rates == [1e-3, 1e-2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1\n b", "cannot be read as YAML"),
        (b"\xff\xfe\xfa", "cannot be read as YAML"),
        (b"- base\n- _self_", "holds a list"),
        (b"", "does not build on the defaults"),
        (b"optim: {lr: 1}", "does not build on the defaults"),
    ],
)
def test_a_recipe_that_is_none_is_one_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        composed(tmp_path / "mine.yaml", [])


def test_only_what_was_swept_is_in_the_name() -> None:
    given = ["optim=adamw,sgd", "optim.lr=1e-3,1e-2", "eval.teacher_accuracy=false", "zero=2"]
    own = ["optim=sgd", "optim.lr=0.01", "eval.teacher_accuracy=False", "zero=2"]
    assert job_name(own, given, 3) == "optim=sgd,optim.lr=0.01"


def test_a_swept_path_makes_one_folder() -> None:
    assert job_name(["teacher.model=a/b"], ["teacher.model=a/b,c/d"], 0) == "teacher.model=a_b"


def test_a_sweep_over_nothing_still_has_a_name() -> None:
    assert job_name(["zero=1"], ["zero=1"], 0) == "job_0"


@pytest.mark.parametrize(
    "fixed",
    [
        r"student.model=C\:/m",
        "student.model=http://host:1/m",
        "student.model='a b, c: d'",
        'student.model="a b"',
        r"student.model=a\,b\=c",
        r"student.model=a\ b\(c\)",
        "student.model='1'",
        "eval.teacher_accuracy=False",
        "eval.max_tokens=null",
        "+data.chat_options={a: 1, b: 'x:y'}",
        "+data.chat_options.enable_thinking=false",
    ],
)
def test_what_was_not_swept_is_in_no_job_s_name(fixed: str) -> None:
    names: list[str] = []
    sweep(find_recipe("quickstart"), ["optim.lr=1e-3,1e-2", fixed], lambda _, n: names.append(n))
    assert names == ["optim.lr=0.001", "optim.lr=0.01"]


def test_a_swept_value_is_named_without_escapes() -> None:
    names: list[str] = []
    swept = r"student.model=C\:\(m\),b\:c"
    sweep(find_recipe("quickstart"), [swept], lambda _, name: names.append(name))
    assert names == ["student.model=C:(m)", "student.model=b:c"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "loss=policy_gradient",
            "optim=sgd",
            "teacher=local",
            "mask=discover",
            "run.dir=elsewhere",
        ],
        ["method=sft", "adapter=lora", "data.completion_field=null", "tracking=wandb"],
    ],
)
def test_the_config_of_a_run_is_a_recipe_for_the_same_run(
    overrides: list[str], tmp_path: Path
) -> None:
    recipe = load_recipe("quickstart", *overrides)
    describe(recipe, tmp_path)
    again = load_recipe(tmp_path / "config.yaml")
    assert again.plain == recipe.plain
    assert again.choices | {"method": ""} == recipe.choices | {"method": ""}
    assert load_recipe(tmp_path / "config.yaml", "train.steps=7").config.train.steps == 7


def test_a_function_s_file_beside_the_recipe_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    (home / "mine.yaml").write_text(
        OWN.replace("_self_", "{override reward: function}, _self_")
        + "reward: {function: my_reward.py:f}\n"
    )
    for name in ("my_reward.py", "rows.py"):
        (home / name).write_text("")
    monkeypatch.chdir(elsewhere)

    def functions(*overrides: str) -> tuple[str, str | None]:
        recipe = composed(home / "mine.yaml", [*overrides])
        assert isinstance(recipe.config.reward, FunctionRewardConfig)
        assert recipe.plain["reward"]["function"] == recipe.config.reward.function
        return recipe.config.reward.function, recipe.config.data.function

    assert functions("data.function=rows.py:g") == (
        f"{home}/my_reward.py:f",
        f"{home}/rows.py:g",
    )
    assert functions("data.function=none.py:g")[1] == "none.py:g"
    (elsewhere / "my_reward.py").write_text("")
    assert functions()[0] == "my_reward.py:f", "the working directory comes first"
