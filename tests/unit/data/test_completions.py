"""Completions of a data set: where they are read, and the one end that each has."""

import pytest

from opd.config.data import DataConfig
from opd.data.completions import Completions
from opd.data.prompts import load_prompts
from opd.data.tokenizer import StudentTokenizer

USER = {"role": "user", "content": "q"}


def student(tokenizer, turn_end="<|im_end|>"):
    return StudentTokenizer(
        tokenizer=tokenizer,
        declared_stop_ids=[tokenizer.eos_token_id],
        turn_end_id=tokenizer.convert_tokens_to_ids(turn_end),
        pad_id=0,
        max_length=100,
        vocab_size=len(tokenizer),
    )


def completion(path, tokenizer, *, field="completion", max_tokens=64, **settings):
    """The text of the first row's completion, its end included."""
    completions = Completions.of_student(student(tokenizer), field=field, max_tokens=max_tokens)
    data = DataConfig(**settings)
    prompt = load_prompts(path, tokenizer, data, completions=completions)[0]
    return tokenizer.decode(prompt.completion_ids)


@pytest.mark.parametrize(
    ("row", "settings", "end"),
    [
        ({"prompt": "q"}, {}, "<eos>"),
        ({"prompt": "q"}, {"chat": True}, "<|im_end|>"),
        ({"prompt": [USER]}, {}, "<|im_end|>"),
        ({"prompt": "q", "n": 1}, {"template": "{prompt}?"}, "<eos>"),
        ({"prompt": "q", "n": 1}, {"template": "{prompt}?", "chat": True}, "<|im_end|>"),
    ],
)
def test_a_completion_ends_as_its_prompt_s_format_does(row, settings, end, tokenizer, write):
    path = write(row | {"completion": "abc"})
    assert completion(path, tokenizer, **settings) == f"abc{end}"


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("text", "learned"),
    [
        ("abc<|im_end|>", "abc<|im_end|>"),
        ("abc<eos>", "abc<eos>"),
        ("abc<|im_end|>\n", "abc<|im_end|>"),
        ("abc<|im_end|>\n<eos>", "abc<|im_end|>"),
        ("abc<eos><eos> \n", "abc<eos>"),
        ("a<|im_end|>\n<user>b<eos>", "a<|im_end|>\n<user>b<eos>"),
    ],
)
def test_a_completion_with_its_end_gets_no_second_one(text, learned, chat, tokenizer, write):
    path = write({"prompt": "q", "completion": text})
    assert completion(path, tokenizer, chat=chat) == learned


def test_white_space_without_an_end_behind_it_is_kept(tokenizer, write):
    assert completion(write({"prompt": "q", "completion": " a \n"}), tokenizer) == " a \n<eos>"


def test_a_mixed_file_ends_each_row_by_its_own_prompt(tokenizer, write):
    path = write({"prompt": "q", "completion": "a"}, {"prompt": [USER], "completion": "b"})
    completions = Completions.of_student(student(tokenizer), field="completion", max_tokens=9)
    prompts = load_prompts(path, tokenizer, DataConfig(), completions=completions)
    learned = [tokenizer.decode(prompt.completion_ids) for prompt in prompts]
    assert learned == ["a<eos>", "b<|im_end|>"]


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("abc", "abc<|im_end|>"),
        ("abc<|im_end|>", "abc<|im_end|>"),
        ([{"type": "text", "text": "abc"}], "abc<|im_end|>"),
        ("<think>x</think>abc", "<think>x</think>abc<|im_end|>"),
    ],
)
def test_the_assistant_s_last_turn_is_the_completion(answer, learned, tokenizer, write):
    path = write({"prompt": [USER, {"role": "assistant", "content": answer}]})
    assert completion(path, tokenizer, field=None) == learned


THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OTHER_START = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer", "learned"),
    [
        (THINKS, "abc", "<think></think>abc<|im_end|>"),
        (FORGETS, "<think>x</think>abc", "<think>x</think>abc<|im_end|>"),
        (OTHER_START, "abc", "abc<|im_end|>"),
    ],
    ids=["adds", "removes", "starts otherwise"],
)
def test_what_a_template_writes_into_the_turn_is_learned_and_nothing_is_lost(
    template, answer, learned, make_tokenizer, write
):
    path = write({"prompt": [USER, {"role": "assistant", "content": answer}]})
    assert completion(path, make_tokenizer(template), field=None) == learned


@pytest.mark.parametrize(
    "value",
    [[{"role": "assistant", "content": "abc"}], "abc", [{"role": "assistant", "content": ["abc"]}]],
)
def test_a_column_of_completions_holds_text_or_one_message(value, tokenizer, write):
    row = {"prompt": [USER, {"role": "assistant", "content": "other"}], "out": {"text": value}}
    assert completion(write(row), tokenizer, field="out.text") == "abc<|im_end|>"


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [
        ({"prompt": "q"}, "completion", "found no completion in field 'completion'"),
        ({"prompt": "q", "completion": None}, "completion", "found no completion in field"),
        ({"prompt": "q", "completion": ""}, "completion", "found an unusable completion"),
        ({"prompt": "q", "completion": [USER]}, "completion", "list of one assistant's message"),
        ({"prompt": "q", "completion": "<eos>"}, "completion", "nothing but its end"),
        ({"prompt": "q", "completion": "x" * 9}, "completion", "found a completion of 10 tokens"),
        ({"prompt": "q", "completion": "\ud83d"}, "completion", "in the completion near"),
        (
            {"prompt": [USER, {"role": "assistant", "content": "\udc00"}]},
            None,
            "in the completion near",
        ),
        ({"prompt": "q"}, None, "data.completion_field is not set"),
        ({"prompt": [USER]}, None, "data.completion_field is not set"),
        (
            {"prompt": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            None,
            "nothing but its end",
        ),
    ],
)
def test_a_row_without_a_usable_completion_is_named(row, field, words, tokenizer, write):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: ") as refused:
        completion(write(row), tokenizer, field=field, max_tokens=8)
    assert words in str(refused.value)


def test_a_tool_call_is_learned_as_the_template_writes_it(make_tokenizer, write):
    calls = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "call {{ c.name }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    path = write({"prompt": [USER, turn]})
    assert completion(path, make_tokenizer(calls), field=None) == "call f<|im_end|>"
