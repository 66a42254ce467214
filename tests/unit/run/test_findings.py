"""What a check says of end tokens, answers and templates, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from opd.run.preflight import check
from opd.run.recipe import composed, find_recipe
from opd.run.train import train as train_run

QUICKSTART = find_recipe("quickstart")
ALONE = ("teacher=none", "loss=nll", "launch.processes=1", "launch.engine=torch")
GRPO = (
    "method=grpo",
    "teacher=none",
    "data.eval=null",
    "launch.processes=1",
    "launch.engine=torch",
)
USER = {"role": "user", "content": "1+2="}
ASSISTANT = {"role": "assistant", "content": "1+2=#3"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(*given: object, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in given))
    return f"data.train={name}"


def model(quickstart: Path, template: str | None, *, vocab_size: int = 33) -> str:
    """The quickstart's student with a chat template and one more special token, <|eot|> (id 32)."""
    shutil.copytree(quickstart / "student", "student")
    tokenizer = PreTrainedTokenizerFast.from_pretrained("student")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained("student")
    config = Path("student/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": vocab_size}))
    return "student.model=student"


def found(*overrides: str) -> str:
    recipe = composed(QUICKSTART, [*ALONE, "train.prompts_per_step=1", *overrides])
    return " ".join(check(recipe, Path("run")).findings)


def template(end: str) -> str:
    return f"{{% for m in messages %}}{{{{ m.content }}}}{end}{{% endfor %}}"


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("<eos>", None),
        ("<|eot|>", "ends an answer with '<|eot|>', and the model's files name ['<eos>']"),
        ("", "writes no end token behind an answer, and the student stops at ['<eos>']"),
        (
            "{% if loop.index > 1 %}{{ raise_exception('once') }}{% endif %}",
            "not known (a question",
        ),
    ],
    ids=["declared", "not declared", "none", "refuses"],
)
def test_the_end_of_an_answer_is_said_where_it_is_not_the_declared_one(
    end: str, words: str | None, quickstart: Path
) -> None:
    chat = [model(quickstart, template(end)), "data.eval=null"]
    said = found(*chat, "data.chat=true")
    assert words in said if words else "answer" not in said
    assert "chat template" not in found(*chat, "data.chat=false"), "no chat"


def test_an_end_outside_the_embedding_is_refused_for_chats_alone(quickstart: Path) -> None:
    student = model(quickstart, template("<|eot|>"), vocab_size=32)
    assert "<|eot|>" not in found(student, "data.eval=null")
    with pytest.raises(ValueError, match=r"'<\|eot\|>', id 32, outside the model's 32 embedding"):
        found(student, "data.eval=null", "data.chat=true")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "it is left out"),
        (("rollout.on_policy=0",), "it is the completion that is learned"),
        (("rollout.on_policy=0.5", "data.completion_field=done"), "it is left out"),
    ],
)
def test_answers_behind_the_prompts_are_counted_and_said_once(
    overrides: tuple[str, ...], words: str, quickstart: Path
) -> None:
    train = rows(*[{"prompt": [USER, ASSISTANT], "done": "1+2=#3"}] * 3)
    said = found(model(quickstart, template("<eos>")), train, "data.eval=null", *overrides)
    assert (
        f"3 of the 3 prompts of data.train have the assistant's turn behind them: {words}" in said
    )
    assert said.count("behind them") == 1


def test_answers_behind_held_out_prompts_are_left_out(quickstart: Path) -> None:
    rows(
        {"prompt": [USER, ASSISTANT], "answer": "3"},
        {"prompt": [USER], "answer": "3"},
        name="e.jsonl",
    )
    said = found(model(quickstart, template("<eos>")), "data.eval=e.jsonl", "eval.kl_prompts=1")
    assert (
        "1 of the 2 prompts of data.eval have the assistant's turn behind them: it is left out"
        in said
    )


def test_a_template_around_messages_is_said(quickstart: Path) -> None:
    train = rows({"prompt": [USER]}, {"prompt": "1+2="})
    student = model(quickstart, template("<eos>"))
    said = found(student, train, "data.eval=null", "data.template='{prompt}'")
    assert (
        "1 of the 2 prompts of data.train are lists of messages: data.template is put around"
        in said
    )
    assert "messages" not in found(student, train, "data.eval=null")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.teacher_template='{prompt}#{answer}'", "data.teacher_template is put around their"),
        ("data.teacher_template='1+{answer}='", "data.teacher_template takes the place of their"),
        ("data.teacher_template='{answer}'", "data.teacher_template takes the place of their"),
    ],
)
def test_a_teacher_s_template_around_messages_is_said_as_it_is(
    setting: str, words: str, quickstart: Path
) -> None:
    train = rows({"prompt": [USER], "answer": "3"})
    said = found(model(quickstart, template("<eos>")), train, "data.eval=null", setting)
    assert words in said


FIRST_TURN = "{{ messages[0].content }}{% if messages | length > 1 %}={% endif %}"


@pytest.mark.parametrize(
    ("answers", "chat_template", "words"),
    [
        (
            (False, False),
            "{{ messages[-1].content }}",
            "in 2 of the 2 prompts of data.train, the chat",
        ),
        (
            (True, True),
            "{{ messages[-1].content }}",
            "in 2 of the 2 prompts of data.train, the chat",
        ),
        ((False, False), FIRST_TURN, "a user turn, or a part of it, so that the student does not"),
        ((False, True), template("<eos>"), None),
    ],
)
def test_turns_that_the_template_leaves_out_are_counted(
    answers: tuple[bool, ...], chat_template: str, words: str | None, quickstart: Path
) -> None:
    system = {"role": "system", "content": "1+1=#2"}
    train = rows(*({"prompt": [system, USER, *[ASSISTANT] * each]} for each in answers))
    said = found(model(quickstart, chat_template), train, "data.eval=null")
    assert words in said if words else "leaves out" not in said


@pytest.mark.parametrize(
    ("end_of_prompt", "count"), [("", None), ("#", 2), ("#+", 2)], ids=["fits", "mark", "marks"]
)
def test_answers_that_do_not_continue_the_prompt_are_counted(
    end_of_prompt: str, count: int | None, quickstart: Path
) -> None:
    train = rows(*[{"prompt": [USER, ASSISTANT]}] * 2)
    opens = f"{{% if add_generation_prompt %}}{end_of_prompt}{{% endif %}}"
    student = model(quickstart, template("<eos>") + opens)
    said = found(student, train, "data.eval=null", "rollout.on_policy=0")
    words = "does not write the assistant's turn behind the prompt as it is"
    assert (
        f"in {count} of the 2 prompts of data.train, the chat template {words}" in said or not count
    )
    assert (words in said) == bool(count)


@pytest.mark.parametrize("where", ["train", "eval", "kl"])
@pytest.mark.parametrize("token", ["<image>", "<|image|>", "[IMG]"])
def test_an_image_token_is_found_in_every_prompt(token: str, where: str, quickstart: Path) -> None:
    shutil.copytree(quickstart / "student", "student")
    tokenizer = PreTrainedTokenizerFast.from_pretrained("student")
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained("student")
    config = Path("student/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 33}))
    many = [{"prompt": "1+2=", "answer": "3"}] * 80
    last = {"uid": "odd", "prompt": f"1+{token}=", "answer": "3"}
    data = {
        name: rows(*many, *[last] * (name == where), name=f"{name}.jsonl")
        for name in ("train", "eval", "kl")
    }
    measured = ("data.eval=eval.jsonl", "eval.kl_data=kl.jsonl", "eval.kl_prompts=81")
    settings = ("student.model=student", data["train"], *measured)
    with pytest.raises(ValueError, match=r"prompt odd has an image token"):
        found(*settings)


def test_a_completion_that_is_nowhere_is_refused_with_the_setting() -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl:1: .*data\.completion_field is not set"):
        found("rollout.on_policy=0", "data.eval=null")


def test_a_reward_function_without_answers_is_said() -> None:
    Path("mine.py").write_text("def reward(completion, answer):\n    return 1.0\n")
    reward = ("reward=function", "reward.function=mine.py:reward", "loss.reward_weight=1.0")
    grpo = composed(QUICKSTART, [*GRPO, "data.answer_field=label", *reward])
    assert "no training prompt has an answer in field 'label'" in " ".join(
        check(grpo, Path("run")).findings
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            (*GRPO, "data.answer_field=label"),
            r"train\.jsonl:1: .* first of 4096 of 4096 rows.*reward=grader",
        ),
        ((*ALONE, "data.eval_answer_field=label"), r"eval\.jsonl:1: .*data\.eval_answer_field"),
        ((*ALONE, "data.answer_field=label"), r"eval\.jsonl:1: .*the evaluation compares"),
    ],
)
def test_answers_that_are_nowhere_are_refused_before_a_model_is_loaded(
    overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check(composed(QUICKSTART, list(overrides)), Path("run"))


@pytest.mark.parametrize(
    ("answer", "refused"),
    [("five", True), (["five", "six"], True), (["five", "5"], False), (5, False)],
)
@pytest.mark.parametrize("graded", ["train", "eval"])
def test_an_answer_that_the_grader_number_cannot_use_is_refused_by_a_check(
    graded: str, answer: object, refused: bool
) -> None:
    rows({"uid": "odd", "prompt": "1+2=", "answer": answer}, name=f"{graded}.jsonl")
    settings = (
        [*GRPO, "reward.grader=number", "data.train=train.jsonl"]
        if graded == "train"
        else [*ALONE, "eval.grader=number", "data.eval=eval.jsonl", "eval.kl_prompts=1"]
    )
    recipe = composed(QUICKSTART, [*settings, "train.prompts_per_step=1"])
    if refused:
        with pytest.raises(ValueError, match=r"prompt odd: found the answer .* without a number"):
            check(recipe, Path("run"))
    else:
        assert check(recipe, Path("run")).prompts is not None


THINKS = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}##{% endif %}"
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["data.chat_options.enable_thinking=true"],
            "enable_thinking=True changes none of the first",
        ),
        (["data.chat_options.enable_thinking=false"], None),
        (
            ["data.chat_options.enable_thinking=false", "data.chat=false"],
            "data.chat_options has no effect",
        ),
        (["data.chat_template=student", "data.chat=false"], "data.chat_template has no effect"),
        (["data.chat_template=student"], None),
    ],
)
def test_chat_settings_that_change_nothing_are_said(
    settings: list[str], words: str | None, quickstart: Path
) -> None:
    chat = [model(quickstart, THINKS), "data.eval=null", "data.chat=true"]
    said = found(*chat, *(s.replace("data.chat_o", "+data.chat_o") for s in settings))
    assert words in said if words else "data.chat_" not in said


def test_a_chat_option_that_no_template_uses_is_refused(quickstart: Path) -> None:
    chat = [model(quickstart, THINKS), "data.eval=null", "data.chat=true"]
    with pytest.raises(
        ValueError, match=r"data\.chat_options\.enable_thinkng: .*did you mean enable_th"
    ):
        found(*chat, "+data.chat_options.enable_thinkng=false")


def test_dropped_prompts_are_counted_in_the_plan() -> None:
    train = rows({"prompt": "1+2=", "answer": "3"}, {"prompt": "1111+2222=", "answer": "3333"})
    limits = ["data.eval=null", "data.max_prompt_tokens=5"]
    assert "1 of the 2 prompts of data.train are too long and are dropped" in found(
        train, *limits, "data.filter_overlong_prompts=true"
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: found a prompt of 10 tokens; allowed: 5"):
        found(train, *limits)


def test_a_dry_run_shows_the_first_prompt(
    quickstart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = ("teacher=local", "launch.processes=1", "launch.engine=torch", "rollout=transformers")
    train_run("quickstart", *local, "data.teacher_template='{answer}#{prompt}'", "dry_run=true")
    shown = capsys.readouterr().out
    assert "prompt train-00000 as the student sees it, 6 tokens:\n41+53=\n" in shown
    assert "its last 6 tokens: 7 '4', 4 '1', 13 '+', 8 '5', 6 '3', 14 '='" in shown
    assert "prompt train-00000 as the teacher sees it, 9 tokens:\n94#41+53=\n" in shown


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.train=[]", "data.train is an empty list"),
        ("data.train=[{path: a.jsonl, spilt: x}]", "unknown setting 'spilt'"),
        ("data.eval=[{path: a.jsonl, weight: 1}]", "data.eval has weights"),
    ],
)
def test_sources_of_another_form_are_refused_before_anything_is_read(
    setting: str, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        found(setting)
