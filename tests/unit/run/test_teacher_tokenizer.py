"""teacher.tokenizer=own: which prompts the teacher sees, what is refused, and in which words."""

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from opd.config.schema import problems
from opd.data.prompt_sets import read_prompt_sets
from opd.data.tokenizer import read_student_tokenizer
from opd.run.preflight import check
from opd.run.recipe import composed, find_recipe

CROSS = find_recipe("cross_tokenizer_quickstart")
QUICKSTART = find_recipe("quickstart")
RECIPES = CROSS.parent
ALONE = ("launch.processes=1", "launch.engine=torch", "rollout=transformers")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_template(name: str, template: str) -> str:
    """A copy of one of the recipe's models with a chat template."""
    shutil.copytree(RECIPES / name, name.replace("/", "_"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name.replace("/", "_"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(name.replace("/", "_"))
    return name.replace("/", "_")


def test_plain_prompts_are_the_same_text_in_the_teachers_tokens() -> None:
    config = composed(CROSS, []).config
    student = read_student_tokenizer(config.student)
    teacher = PreTrainedTokenizerFast.from_pretrained(config.teacher.model)
    prompts = read_prompt_sets(config, student)
    for prompt in (*prompts.train[:50], *prompts.eval[:50], *prompts.divergence[:5]):
        assert prompt.teacher_ids is not None
        assert teacher.decode(prompt.teacher_ids) == student.decode(prompt.token_ids)
        assert len(prompt.teacher_ids) <= len(prompt.token_ids)


def test_messages_are_rendered_with_the_teachers_own_chat_template() -> None:
    user = "{% for m in messages %}{{ m.content }}{% endfor %}"
    student = with_template("quickstart/student", "?" + user + "!")
    teacher = with_template("cross_tokenizer/teacher", "[user]" + user + "[/user]")
    config = composed(
        CROSS, [f"student.model={student}", f"teacher.model={teacher}", "data.chat=true"]
    ).config
    prompts = read_prompt_sets(config, read_student_tokenizer(config.student))
    own = PreTrainedTokenizerFast.from_pretrained(teacher)
    prompt = prompts.train[0]
    assert prompt.text == "?41+53=!"
    assert own.decode(prompt.teacher_ids) == "[user]41+53=[/user]"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss=reverse_kl"], "use loss=policy_gradient (sampled tokens) or loss=uld"),
        (["loss=topk_forward_kl"], "use loss=policy_gradient (sampled tokens) or loss=uld"),
        (
            ["loss=reverse_kl", "loss.support=student_top_k"],
            "which mean other tokens to the teacher",
        ),
        (["teacher.tokenizer=shared"], "loss=uld compares distributions over two vocabularies"),
        (["loss.weighting=teacher_entropy"], "use loss.weighting=uniform, student_entropy or gap"),
        (["teacher=self"], "found teacher=self"),
        (["teacher=pool", "+teacher.members.a=b"], "found teacher=pool"),
        (
            ["teacher=server", "teacher.url=http://h:1", "teacher.model=null"],
            "need teacher.model too",
        ),
        (["data.teacher_chat_template=m"], "uses the teacher's own chat template"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(overrides: list[str], words: str) -> None:
    found = problems(composed(CROSS, [*overrides, *_teacher(overrides)]).config)
    assert len([problem for problem in found if words in problem]) == 1, found
    assert all("\n" not in problem for problem in found)


def _teacher(overrides: list[str]) -> list[str]:
    """Another choice of teacher starts from its own defaults."""
    chosen = any(override.startswith("teacher=") for override in overrides)
    return ["teacher.tokenizer=own"] if chosen else []


@pytest.mark.parametrize("loss", ["uld", "policy_gradient", "grpo", "nll"])
def test_losses_of_sampled_tokens_and_of_two_vocabularies_are_allowed(loss: str) -> None:
    reward = ["reward=grader", "rollout.n=2"] if loss == "grpo" else []
    found = problems(composed(CROSS, [f"loss={loss}", *reward]).config)
    assert found == []


def test_a_teacher_with_another_vocabulary_is_refused_with_the_setting_that_allows_it(
    tmp_path: Path,
) -> None:
    model = RECIPES / "cross_tokenizer" / "teacher"
    recipe = composed(QUICKSTART, [f"teacher.model={model}", *ALONE, "teacher=local"])
    with pytest.raises(ValueError, match=r"or set teacher\.tokenizer=own"):
        check(recipe, tmp_path / "run")
    own = composed(CROSS, ["loss=policy_gradient", *ALONE])
    checked = check(own, tmp_path / "own")
    assert "log-probs of the requested ids" in str(checked.transport)
    assert not [finding for finding in checked.findings if "end" in finding]


def test_the_transport_of_uld_is_over_the_teachers_own_vocabulary(tmp_path: Path) -> None:
    checked = check(composed(CROSS, list(ALONE)), tmp_path / "run")
    assert "hidden states in float32, 772 bytes a token" in str(checked.transport)
    assert "whole vocabulary would be 1,292" in str(checked.transport), (
        "4 bytes for each of 322 ids"
    )
