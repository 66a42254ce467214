"""Templates over columns: the text of messages and numbers; what has no one text is named."""

import pytest

from opd.config.data import DataConfig
from opd.data.prompts import load_prompts

USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}
ASSISTANT = {"role": "assistant", "content": "a"}


def load(path, tokenizer, **settings):
    return load_prompts(path, tokenizer, DataConfig(**settings)).prompts[0]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER], "<user>[q]<assistant>"),
        ([SYSTEM, USER], "<system>s<user>[q]<assistant>"),
        ([USER, ASSISTANT], "<user>[q]<assistant>"),
        ([USER, ASSISTANT, USER], "<user>q<assistant>a<|im_end|>\n<user>[q]<assistant>"),
        ([USER | {"content": [{"type": "text", "text": "q"}]}], "<user>[q]<assistant>"),
    ],
)
@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_template_is_put_around_the_last_user_s_turn(field, messages, text, tokenizer, write):
    path = write({field: messages})
    templates = {"[{prompt}]", f"[{{{field}}}]"}
    for template in templates:
        assert load(path, tokenizer, prompt_field=field, template=template).text == text


def test_a_teacher_s_template_is_put_around_messages_too(tokenizer, write):
    path = write({"prompt": [SYSTEM, USER], "solution": "1+1=2"})
    prompt = load(path, tokenizer, teacher_template="{prompt}({solution})")
    assert prompt.text == "<system>s<user>q<assistant>"
    assert tokenizer.decode(prompt.teacher_ids) == "<system>s<user>q(1+1=2)<assistant>"


@pytest.mark.parametrize(
    ("messages", "seen"),
    [
        ([USER], "<user>1+1=2 is q<assistant>"),
        ([SYSTEM, USER], "<system>s<user>1+1=2 is q<assistant>"),
        ([USER, ASSISTANT], "<user>1+1=2 is q<assistant>"),
        (
            [USER, ASSISTANT, USER],
            "<user>q<assistant>a<|im_end|>\n<user>1+1=2 is q<assistant>",
        ),
        ("q", "1+1=2 is q"),
    ],
)
def test_a_teacher_s_template_without_the_prompt_stays_in_the_conversation(
    messages, seen, tokenizer, write
):
    path = write({"prompt": messages, "solution": "1+1=2", "question": "q"})
    prompt = load(path, tokenizer, teacher_template="{solution} is {question}")
    assert tokenizer.decode(prompt.teacher_ids) == seen
    plain = load(path, tokenizer, template="{question}", teacher_template="{solution}")
    assert (plain.text, tokenizer.decode(plain.teacher_ids)) == ("q", "1+1=2"), "both are plain"


def test_a_template_over_other_columns_does_not_look_at_the_prompt(tokenizer, write):
    path = write({"prompt": [SYSTEM], "question": "q"})
    assert load(path, tokenizer, template="{question}?").text == "q?"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "x"),
        (5, "5"),
        (5.0, "5"),
        (1e-7, "0.0000001"),
        (True, "true"),
        (["x"], "x"),
        ([ASSISTANT], "a"),
        (ASSISTANT, "a"),
        ("", ""),
    ],
)
def test_a_column_is_filled_in_as_text(value, text, tokenizer, write):
    path = write({"prompt": "q", "more": value, "in": {"more": value}})
    assert load(path, tokenizer, template="{prompt}:{more}").text == f"q:{text}"
    assert load(path, tokenizer, template="{prompt}:{in.more}").text == f"q:{text}"
    assert load(path, tokenizer, template="{prompt}:{in[more]}").text == f"q:{text}"


def test_a_format_is_applied_to_a_number(tokenizer, write):
    path = write({"prompt": "q", "x": 0.5})
    assert (
        load(path, tokenizer, template="{prompt} {x:.2f} {prompt!r} {prompt:>3}").text
        == "q 0.50 'q'   q"
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "found null in field 'more'"),
        (["x", "y"], "found a list of 2 in field 'more'"),
        ([], "found a list of 0 in field 'more'"),
        ([USER, ASSISTANT], "found a list of 2 in field 'more'"),
        ({"text": "x"}, "found a struct ('text') in field 'more'"),
        ([None], "found null in field 'more'"),
        (float("nan"), "found nan in field 'more'"),
        (float("-inf"), "found -inf in field 'more'"),
        ([float("nan")], "found nan in field 'more'"),
    ],
)
@pytest.mark.parametrize("setting", ["template", "teacher_template"])
def test_a_column_without_one_text_is_named_with_its_place(setting, value, words, tokenizer, write):
    path = write({"prompt": "q", "more": value})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: ") as refused:
        load(path, tokenizer, **{setting: "{prompt}({more})"})
    assert words in str(refused.value)
    assert f"data.{setting} takes" in str(refused.value)


@pytest.mark.parametrize("prompt", [None, [], [SYSTEM], [USER, {"role": "tool", "content": "4"}]])
def test_a_prompt_without_a_user_s_turn_is_named(prompt, tokenizer, write):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*(null|empty|system|tool)"):
        load(write({"prompt": prompt}), tokenizer, template="[{prompt}]")


@pytest.mark.parametrize("template", ["{", "{prompt", "}"])
def test_a_template_that_is_none_names_its_setting(template, tokenizer, write):
    with pytest.raises(ValueError, match=r"data\.teacher_template=.* cannot be filled"):
        load(write({"prompt": "q"}), tokenizer, teacher_template=template)


@pytest.mark.parametrize("template", ["{absent}", "{prompt.absent}", "{}", "{0}", "{in.absent}"])
def test_a_field_that_is_absent_is_named_with_those_there_are(template, tokenizer, write):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the template needs the field .*'in\.x'"):
        load(write({"prompt": "q", "in": {"x": 1}}), tokenizer, template=template)
