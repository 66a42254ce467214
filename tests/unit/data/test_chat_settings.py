"""Chat templates, their options and tools from the recipe, for student and teacher apart."""

import copy
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from opd.config.data import DataConfig
from opd.config.sources import data_sources
from opd.data.chat_template import read_chat_template, require_used, template_variables
from opd.data.idle_options import idle_options
from opd.data.preview import preview
from opd.data.prompt_sets import PromptSets
from opd.data.prompts import load_prompts

USER = {"role": "user", "content": "q"}
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
"""Thinking is on unless it is turned off, as in Qwen3's template."""
WITH_TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t | tojson }}{% endfor %}]{% endif %}" + THINKING
)
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


def load(source, tokenizer, teacher=None, **settings):
    data = DataConfig(**settings)
    return load_prompts(source, tokenizer, data, teacher_tokenizer=teacher).prompts


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, "<assistant>"),
        ({"enable_thinking": True}, "<assistant>"),
        ({"enable_thinking": False}, "<assistant><think></think>"),
    ],
)
def test_thinking_is_turned_on_and_off(options, end, make_tokenizer, write):
    (prompt,) = load(write({"prompt": [USER]}), make_tokenizer(THINKING), chat_options=options)
    assert prompt.text == f"<user>q{end}"


def test_the_teacher_may_think_where_the_student_does_not(make_tokenizer, write):
    tokenizer = make_tokenizer(THINKING)
    (prompt,) = load(
        write({"prompt": [USER]}),
        tokenizer,
        chat_options={"enable_thinking": False},
        teacher_chat_options={},
    )
    assert prompt.text == "<user>q<assistant><think></think>"
    assert tokenizer.decode(prompt.teacher_ids) == "<user>q<assistant>"


@pytest.mark.parametrize("setting", ["chat_options", "teacher_chat_options"])
def test_an_option_that_the_template_does_not_use_is_refused(setting, make_tokenizer, write):
    path = write({"prompt": [USER]})
    with pytest.raises(ValueError, match=rf"data\.{setting}\.enable_thinkin: ") as refused:
        load(path, make_tokenizer(THINKING), **{setting: {"enable_thinkin": False}})
    assert "did you mean enable_thinking? it uses enable_thinking:" in str(refused.value)
    plain = write({"prompt": "q"}, name="plain.jsonl")
    assert load(plain, make_tokenizer(THINKING), **{setting: {"enable_thinkin": False}})


def test_the_student_s_options_need_not_be_of_the_teacher_s_template(make_tokenizer, write):
    student, teacher = make_tokenizer(THINKING), make_tokenizer("T{{ messages[0].content }}")
    path = write({"prompt": [USER]})
    (prompt,) = load(path, student, teacher, chat_options={"enable_thinking": False})
    assert student.decode(prompt.teacher_ids) == "Tq"


@pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize"])
def test_what_opd_sets_itself_is_no_option_of_the_teacher_either(name, tokenizer, write):
    with pytest.raises(ValueError, match=rf"found {name} in data\.teacher_chat_options"):
        load(write({"prompt": [USER]}), tokenizer, teacher_chat_options={name: True})


@pytest.mark.parametrize(
    ("template", "used"),
    [
        (THINKING, {"enable_thinking"}),
        (
            "{{ bos_token }}{% for m in messages %}{% break %}{% endfor %}{{ date_string }}",
            {"date_string"},
        ),
        ("{% set x = 1 %}{{ x }}{%- generation -%}{{ y }}{% endgeneration %}", {"y"}),
        ({"default": "{{ a }}", "tool_use": "{{ tools }}{{ b }}"}, {"a", "b", "tools"}),
        ("{% if %}", None),
        (None, None),
    ],
)
def test_the_variables_of_a_template_are_known(template, used):
    assert template_variables(template) == used


def test_an_unreadable_template_is_left_to_its_rendering(make_tokenizer):
    require_used("data.chat_options", ["x"], make_tokenizer("{% if %}"))


def test_options_that_change_nothing_are_named(make_tokenizer, write):
    sources = data_sources(
        "data.train",
        [write({"prompt": [USER]}), write({"prompt": [USER]}, name="b.jsonl")],
        DataConfig(chat_options={"enable_thinking": True}),
    )
    assert idle_options(sources, make_tokenizer(THINKING)) == ["enable_thinking"]
    off = DataConfig(chat_options={"enable_thinking": False})
    sources = data_sources("data.train", write({"prompt": [USER]}), off)
    assert idle_options(sources, make_tokenizer(THINKING)) == []


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tools_of_a_row_go_to_the_template(as_text, kind, make_tokenizer, write, tmp_path):
    other = {"type": "function", "function": {"name": "add", "strict": True}}
    rows = [
        {"prompt": [USER], "tools": json.dumps(tools) if as_text else tools}
        for tools in ([SEARCH], [other])
    ]
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = write(*rows)
    first, second = load(str(path), make_tokenizer(WITH_TOOLS))
    assert json.loads(first.text.partition("<user>")[0]) == [SEARCH]
    assert json.loads(second.text.partition("<user>")[0]) == [other], "no keys of the other row"


def test_tools_are_read_from_the_column_that_is_named(make_tokenizer, write):
    path = write({"prompt": [USER], "meta": {"functions": [SEARCH]}})
    tokenizer = make_tokenizer(WITH_TOOLS)
    assert load(path, tokenizer)[0].text == "<user>q<assistant>"
    assert "search" in load(path, tokenizer, tools_field="meta.functions")[0].text


@pytest.mark.parametrize("value", ["search", '{"name": "f"}', [3], ["f"], "[1]"])
def test_tools_of_another_form_are_named_with_their_row(value, make_tokenizer, write):
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: found tools .* in field 'tools'; expected"
    ):
        load(write({"prompt": [USER], "tools": value}), make_tokenizer(WITH_TOOLS))


def test_a_template_is_read_from_a_file_or_a_model(tmp_path, make_tokenizer):
    file = tmp_path / "chat.jinja"
    file.write_text(THINKING)
    assert read_chat_template("data.chat_template", str(file)) == THINKING
    make_tokenizer(WITH_TOOLS).save_pretrained(tmp_path / "model")
    assert read_chat_template("s", str(tmp_path / "model")) == WITH_TOOLS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.jinja", "there is no such file"),
        ("wrong.jinja", "is no readable Jinja template"),
        ("latin.jinja", "is no readable Jinja template"),
        ("bare", "its tokenizer has no chat template"),
        ("nowhere", "cannot be read as a template file, a model folder or a hub id"),
    ],
)
def test_what_is_no_template_is_one_sentence(name, words, tmp_path, monkeypatch, make_tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("wrong.jinja").write_text("{% if %}")
    Path("latin.jinja").write_bytes(b"\xe9")
    make_tokenizer(None).save_pretrained("bare")
    with pytest.raises(ValueError, match=rf"^data\.chat_template={name}") as refused:
        read_chat_template("data.chat_template", name)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def shown(prompts, tokenizer, teacher=True):
    sets = PromptSets(train=prompts, eval=[], divergence=[], max_length=1, teacher_max_length=1)
    return list(preview(sets, tokenizer, teacher=teacher))


def test_the_first_prompt_is_shown_token_by_token_at_its_ends(make_tokenizer, write):
    tokenizer = make_tokenizer("<bos><bos>" + THINKING)
    prompts = load(write({"prompt": [USER]}), tokenizer, teacher_system="be kind")
    lines = shown(prompts, tokenizer)
    bos = tokenizer.bos_token_id
    assert lines[0] == "prompt 0 as the student sees it, 20 tokens:"
    assert lines[1] == "<bos><bos><user>q<assistant>"
    assert lines[2].startswith(f"its first 3 tokens: {bos} '<bos>', {bos} '<bos>', ")
    assert lines[3].startswith("its last 8 tokens: ")
    assert lines[3].endswith(f"{tokenizer.encode('>')[-1]} '>'")
    assert lines[4].startswith("prompt 0 as the teacher sees it, ")
    assert lines[5] == "<bos><bos><system>be kind<user>q<assistant>"


def test_a_short_prompt_is_shown_once_and_the_teacher_s_where_it_differs(tokenizer, write):
    prompts = load(write({"prompt": "1+2="}), tokenizer)
    lines = shown(prompts, tokenizer)
    assert lines[2].startswith("its last 4 tokens: ")
    assert lines[3:] == ["the teacher sees the same tokens"]
    assert len(shown(prompts, tokenizer, teacher=False)) == 3


def test_a_copied_tokenizer_keeps_its_template(make_tokenizer):
    """The teacher's template goes to a shallow copy of the student's tokenizer."""
    tokenizer = make_tokenizer(THINKING)
    other = copy.copy(tokenizer)
    other.chat_template = "T"
    assert tokenizer.chat_template == THINKING
    assert other("q")["input_ids"] == tokenizer("q")["input_ids"]
