"""Conversations as prompts: whose turn is last, what a template refuses, where an answer ends."""

import json
import re

import pytest

from opd.config.data import DataConfig
from opd.data.chat import end_of_turn
from opd.data.prompts import load_prompts

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
TOOL = {"role": "tool", "content": "4"}


def load(source, tokenizer, **settings):
    return load_prompts(source, tokenizer, DataConfig(**settings)).prompts


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER, ASSISTANT], "<user>q<assistant>"),
        ([SYSTEM, USER, ASSISTANT], "<system>s<user>q<assistant>"),
        ([USER, ASSISTANT, USER, ASSISTANT], "<user>q<assistant>a<|im_end|>\n<user>q<assistant>"),
        ([USER, CALL, TOOL, ASSISTANT], "<user>q<assistant><|im_end|>\n<tool>4<assistant>"),
        ([USER, CALL], "<user>q<assistant>"),
        ([USER, {"role": "assistant", "content": ""}], "<user>q<assistant>"),
    ],
)
def test_an_answer_behind_the_prompt_is_no_part_of_it(messages, text, tokenizer, write):
    (prompt,) = load(write({"prompt": messages}), tokenizer)
    assert prompt.text == text
    assert prompt.has_answer_turn


@pytest.mark.parametrize(
    "messages", [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [USER, CALL, TOOL]]
)
def test_a_prompt_that_ends_with_a_question_is_used_whole(messages, tokenizer, write):
    (prompt,) = load(write({"prompt": messages}), tokenizer)
    assert prompt.text.endswith(f"<{messages[-1]['role']}>{messages[-1]['content']}<assistant>")
    assert not prompt.has_answer_turn


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [SYSTEM],
            "found a system turn last .turns: system.; expected a prompt that ends with a user",
        ),
        ([SYSTEM, ASSISTANT], "found a system turn last .turns: system, assistant"),
        ([USER, SYSTEM], "found a system turn last"),
        ([{"role": "developer", "content": "d"}], "found a developer turn last"),
        ([ASSISTANT], "the prompt is empty in front of the assistant's turn"),
        ([USER, ASSISTANT, ASSISTANT], "found two assistant turns at the end"),
        ([{"role": "user", "content": " \n"}], "the prompt is empty; write one"),
        ([SYSTEM, {"role": "user", "content": ""}, ASSISTANT], "the prompt is empty in front of"),
    ],
)
def test_a_conversation_without_a_question_is_refused(messages, words, tokenizer, write):
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {words}"):
        load(write({"prompt": "fine"}, {"prompt": messages}), tokenizer)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "human", "content": "q"}, "call the role 'human' 'user': rename it"),
        ({"role": "gpt", "content": "q"}, "call the role 'gpt' 'assistant'"),
        ({"role": "User", "content": "q"}, "call the role 'User' 'user'"),
        ({"role": "SYSTEM", "content": "q"}, "call the role 'SYSTEM' 'system'"),
        ({"role": 1, "content": "q"}, 'expected {"role": "user"'),
        ({"from": "human", "value": "q"}, 'expected {"role": "user"'),
        ({"role": "user", "content": None}, 'expected {"role": "user"'),
        ({"role": "user", "content": 5}, 'expected {"role": "user"'),
        ("q", 'expected {"role": "user"'),
        ({"role": "user", "content": [{"type": "image"}]}, "images and other media are not"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, 3]}, "expected parts of text"),
        ({"role": "user", "content": [{"type": "image", "text": ""}]}, "other media are not"),
        ({"role": "user", "content": [{"type": "audio", "text": "x"}]}, "other media are not"),
        ({"role": "user", "content": [{"text": "x", "image": "a.png"}]}, "other media are not"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": "a"}}]},
            "other media are not",
        ),
    ],
)
def test_a_message_of_another_form_is_named(message, words, tokenizer, write):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: message 1 is") as refused:
        load(write({"prompt": [message]}), tokenizer)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        "hi there",
        ["hi there"],
        [{"type": "text", "text": "hi there"}],
        [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}],
        [{"type": "text", "text": "hi there", "image_url": None}],
    ],
)
def test_content_in_parts_of_text_is_their_text(content, tokenizer, write):
    (prompt,) = load(write({"prompt": [{"role": "user", "content": content}]}), tokenizer)
    assert prompt.text == "<user>hi there<assistant>"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([USER]),
        str([USER]),
        ' [ {"content": "q", "role": "user"}]',
        "[{'from': 'human'}]",
        '[{"value": "hi", "from": "human"}]',
        "[{'weight': 1,\n 'role': 'user', 'content': 'q'}]",
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"template": "{prompt}"},
        {"template": "Q: {prompt}", "chat": True},
        {"teacher_template": "{prompt} {hint}"},
    ],
    ids=["bare", "template", "chat", "teacher"],
)
def test_messages_written_as_text_are_refused(settings, text, tokenizer, write):
    path = write({"prompt": text, "hint": "h"})
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: found a list of messages written as text"
    ):
        load(path, tokenizer, **settings)


@pytest.mark.parametrize("text", ['[{"value": 3}]', "[{'a': 'role'}]", "[1, 2]", "[role]"])
def test_other_lists_are_text_of_a_prompt(text, tokenizer, write):
    assert load(write({"prompt": text}), tokenizer)[0].text == text


def test_keys_that_only_other_rows_have_are_not_shown_to_the_template(make_tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": [USER | {"name": "n"}]}, {"prompt": [USER]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    names = (
        "{% for m in messages %}{{ m.content }}{% if m.name is defined %}{{ m.name }}{% endif %}"
    )
    prompts = load(str(tmp_path / "rows.parquet"), make_tokenizer(names + "{% endfor %}"))
    assert [prompt.text for prompt in prompts] == ["qn", "q"]


def test_null_fields_are_not_shown_to_the_template_at_any_depth(make_tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    calls = [{"city": "Paris"}, {"expression": "1+1"}, {"deep": [{"x": "1"}, {"y": "2"}]}]
    rows = [
        {"prompt": [USER, CALL | {"tool_calls": [{"function": {"arguments": each}}]}, TOOL]}
        for each in calls
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arguments = "{{ messages[1].tool_calls[0].function.arguments | tojson }}"
    prompts = load(str(tmp_path / "rows.parquet"), make_tokenizer("q" + arguments))
    assert [json.loads(prompt.text[1:]) for prompt in prompts] == calls


PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text }}!{% endif %}{% endfor %}"
)
STRIPS = "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}{% endfor %}"
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text.strip() }}{% endfor %}"
DROPS = "{% for m in messages %}<{{ m.role }}>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (PARTS, "<system>s<user> q "),
        (EITHER, "<system>s<user> q "),
        (STRIPS, "<system>s<user>q"),
        (FIRST_PART, "<system>s<user>q"),
        (DROPS, "<system><user>"),
    ],
)
def test_a_template_that_takes_parts_alone_gets_them(template, text, make_tokenizer, write):
    path = write({"prompt": [SYSTEM, {"role": "user", "content": " q "}]})
    assert load(path, make_tokenizer(template))[0].text == text


FORGETS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content SHOWN }}{% endif %}{% endfor %}"
)
NO_THINK = "{% for m in messages %}<{{ m.role }}>{{ CONTENT }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (FORGETS.replace("SHOWN", ""), "<system>s /no_think<user>q<assistant>4<user>q"),
        (FORGETS.replace("SHOWN", "| string"), "<system>s /no_think<user>q<assistant>4<user>q"),
        (
            NO_THINK.replace("CONTENT", "m.content | replace('/no_think', '') | trim"),
            "<system>s<user>q<assistant><think>x</think>4<user>q",
        ),
        (
            NO_THINK.replace(
                "CONTENT",
                "m.content.replace('/no_think', '') if m.content is string else m.content | tojson",
            ),
            "<system>s <user>q<assistant><think>x</think>4<user>q",
        ),
    ],
    ids=["removes reasoning", "prints", "removes a switch", "prints as JSON"],
)
def test_a_list_of_parts_is_never_printed_into_a_prompt(template, text, make_tokenizer, write):
    system = {"role": "system", "content": "s /no_think"}
    turns = [system, USER, {"role": "assistant", "content": "<think>x</think>4"}, USER]
    assert load(write({"prompt": turns}), make_tokenizer(template))[0].text == text


def test_earlier_reasoning_may_be_left_out_of_a_template_that_takes_parts(make_tokenizer, write):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text.split('</think>')[-1] }}"
        "{% endfor %}"
    )
    turns = [USER, {"role": "assistant", "content": "<think>x</think>4"}, USER]
    (prompt,) = load(write({"prompt": turns}), make_tokenizer(template))
    assert prompt.text == "<user>q<assistant>4<user>q"


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}q"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "row", "settings", "words"),
    [
        (NO_SYSTEM, [SYSTEM, USER], {}, "refuses the turns system, user: no system turn"),
        (NO_SYSTEM, "q", {"chat": True, "system": "s"}, "no system turn"),
        (NO_SYSTEM, "q", {"chat": True, "teacher_system": "s"}, "no system turn"),
        (ALTERNATE, [USER, USER], {}, "refuses the turns user, user: turns must alternate"),
        ("{{ messages[0].content + messages[0].tool }}", [USER], {}, "no attribute 'tool'"),
        ("{% for m in messages %}{% endif %}", [USER], {}, "unknown tag 'endif'"),
        ("{{ 1 / 0 }}", "q", {"chat": True}, "division by zero"),
        ("{{ messages[9]['content']['x'] }}", [USER], {}, "no element 9"),
        ("{{ strftime_later('%Y') }}", [USER], {}, "'strftime_later' is undefined"),
    ],
)
def test_a_template_s_refusal_is_one_sentence_with_its_words_and_the_row(
    template, row, settings, words, make_tokenizer, write
):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the chat template of ") as refused:
        load(write({"prompt": row}), make_tokenizer(template), **settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


EACH_ENDS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}END{% endfor %}"


@pytest.mark.parametrize(
    ("template", "stops", "end"),
    [
        ("{{ messages[-1].content }}<|im_end|>\n", [], "<|im_end|>"),
        ("{{ messages[-1].content }} <eos>", [], "<eos>"),
        ("{{ messages[-1].content }}<|im_end|>\n<eos>", [], "<|im_end|>"),
        ("<bos>{{ messages[-1].content }}<bos><eos>", [], "<eos>"),
        ("{{ messages[-1].content }}~", ["~"], "~"),
        ("{{ messages[-1].content }}~", [], None),
        ("{{ messages[-1].content }}", [], None),
        ("{{ messages[0].content }}<eos>", [], None),
        (
            "{% for m in messages %}{% if m.role == 'user' %}~{% endif %}{{ m.content }}{% endfor %}",
            ["~"],
            "~",
        ),
        (EACH_ENDS.replace("END", "<|im_end|><eos>"), ["<eos>"], "<eos>"),
        (EACH_ENDS.replace("END", "<|im_end|><eos>"), [], "<|im_end|>"),
        (EACH_ENDS.replace("END", "<|im_end|>") + "<eos>", ["<eos>"], "<|im_end|>"),
        (None, [], None),
    ],
    ids=lambda value: None if value is None else str(value),
)
def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(
    template, stops, end, make_tokenizer
):
    tokenizer = make_tokenizer(template)
    found = end_of_turn(tokenizer, tokenizer.convert_tokens_to_ids(stops))
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


def test_a_template_that_refuses_an_answer_has_no_known_end(make_tokenizer):
    refuses = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}q<eos>"
    with pytest.raises(ValueError, match=r"a question and its answer: .* one turn only"):
        end_of_turn(make_tokenizer(refuses), [])


def test_a_system_message_of_the_teacher_replaces_the_row_s(tokenizer, write):
    path = write({"prompt": [SYSTEM, USER]}, {"prompt": [USER]})
    prompts = load(path, tokenizer, system="ours", teacher_system="expert")
    assert [prompt.text[:8] for prompt in prompts] == ["<system>"] * 2
    assert [prompt.text[8] for prompt in prompts] == ["s", "o"], "data.system is for rows without"
    for prompt in prompts:
        assert tokenizer.decode(prompt.teacher_ids).startswith("<system>expert<user>q")


@pytest.mark.parametrize("name", ["images", "videos", "audios"])
@pytest.mark.parametrize(
    ("value", "refused"),
    [
        (["a.png"], True),
        ([{"bytes": "x"}], True),
        ("a.png", True),
        ({"path": "a.png"}, True),
        ([], False),
        (None, False),
        ("", False),
        ("[]", False),
        ([None], False),
        ({"bytes": None, "path": None}, False),
        (0, False),
    ],
)
@pytest.mark.parametrize("prompt", ["q", [USER]])
def test_a_row_with_media_is_refused(prompt, value, refused, name, tokenizer, write):
    path = write({"prompt": prompt, name: value})
    if refused:
        with pytest.raises(ValueError, match=rf"rows\.jsonl:1: found {name} in field '{name}'"):
            load(path, tokenizer)
    else:
        assert load(path, tokenizer)[0].text.count("q") == 1


FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("value", [[FUNCTION], json.dumps([FUNCTION]), [FUNCTION, FUNCTION]])
def test_tools_of_a_row_are_refused_where_the_template_does_not_use_them(
    value, tokenizer, make_tokenizer, write
):
    path = write({"prompt": [USER], "tools": value})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: found tools in field 'tools'"):
        load(path, tokenizer)
    with_tools = make_tokenizer("{{ tools[0].function.name }}{{ messages[0].content }}")
    assert load(path, with_tools, chat_options={"tools": [FUNCTION]})[0].text == "fq"
    assert load(write({"prompt": "q", "tools": value}), tokenizer)[0].text == "q"
    assert load(write({"prompt": [USER], "tools": []}), tokenizer)[0].text == "<user>q<assistant>"


@pytest.mark.parametrize(
    "name", ["add_generation_prompt", "tokenize", "continue_final_message", "return_dict"]
)
@pytest.mark.parametrize("value", [True, False])
def test_a_chat_option_that_opd_sets_is_refused(name, value, tokenizer, write):
    with pytest.raises(ValueError, match=rf"found {name} in data\.chat_options"):
        load(write({"prompt": "q"}), tokenizer, chat_options={name: value, "enable_thinking": True})


@pytest.mark.parametrize("name", ["system", "teacher_system"])
def test_a_system_message_of_plain_text_has_no_effect_and_says_so(name, tokenizer, write):
    with pytest.warns(UserWarning, match=rf"^data\.{name} has no effect without data\.chat=true"):
        load(write({"prompt": "q"}), tokenizer, **{name: "s"})


BRIEF = {"role": "system", "content": "be brief"}
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content | trim }}{% endif %}"
    "{% endfor %}"
)
CUTS = "{% for m in messages %}<{{ m.role }}>{{ m.content[:3] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "prompt", "settings", "lost"),
    [
        (DROPS_SYSTEM, [BRIEF, USER], {}, ["system turn.*the student does not"]),
        (
            DROPS_SYSTEM,
            "q",
            {"chat": True, "system": "be brief"},
            ["system turn.*the student does not"],
        ),
        (
            DROPS_SYSTEM,
            "q",
            {"chat": True, "teacher_system": "be brief"},
            ["system turn.*the teacher does not"],
        ),
        (CUTS, [{"role": "user", "content": "a long question"}], {}, ["user turn.*the student"]),
        (DROPS_SYSTEM, [{"role": "user", "content": " q\n"}], {}, []),
        (DROPS_SYSTEM, [USER, ASSISTANT, USER], {}, []),
    ],
)
def test_a_turn_that_the_template_leaves_out_is_remarked(
    template, prompt, settings, lost, make_tokenizer, write
):
    (found,) = load(write({"prompt": prompt}), make_tokenizer(template), **settings)
    assert len(found.remarks) == len(lost)
    for remark, words in zip(found.remarks, lost, strict=True):
        assert re.search(words, remark)
