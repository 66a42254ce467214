"""Completions of a data set: where they are read, and the one end that each has."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.config.data import DataConfig
from opd.data.completions import Completions
from opd.data.prompt_rows import OTHER_CONTINUATION, THINKING
from opd.data.prompts import load_prompts
from opd.data.tokenizer import StudentTokenizer

USER = {"role": "user", "content": "q"}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
    prompt = load_prompts(path, tokenizer, data, completions=completions).prompts[0]
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
    prompts = load_prompts(path, tokenizer, DataConfig(), completions=completions).prompts
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


TRIMS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENS = OTHER_START.replace("<assistant><think>", "<assistant><think>\n")
CLOSES = OTHER_START.replace("<assistant><think>", "<assistant><think>\n\n</think>\n\n")
REASONS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "<think>\n{{ m.reasoning_content or (parts[0].replace('<think>', '') | trim if parts | length > 1 "
    "else '') }}\n</think>\n\n{{ parts[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def sft(row, tokenizer, field=None, **settings):
    """The first row's completion as text, and whether something was remarked."""
    path = settings.pop("write")(row)
    completions = Completions.of_student(student(tokenizer), field=field, max_tokens=99)
    (prompt,) = load_prompts(
        path, tokenizer, DataConfig(**settings), completions=completions
    ).prompts
    return tokenizer.decode(prompt.completion_ids), OTHER_CONTINUATION in prompt.remarks


@pytest.mark.parametrize(
    ("template", "answer", "learned", "remarked"),
    [
        (TRIMS, "4\n", "4", False),
        (TRIMS, " 4", "4", False),
        (TRIMS, "a\n\n", "a", False),
        (OPENS, "<think>\nx\n</think>\n\n4", "x\n</think>\n\n4", False),
        (OPENS, "<think>x</think>4", "x</think>4", False),
        (OPENS, "\n<think>\nx</think>4", "x</think>4", False),
        (OPENS, "4", "4", True),
        (CLOSES, "<think>\n\n</think>\n\n4", "4", False),
        (CLOSES, "<think>x</think>4", "<think>x</think>4", True),
        (FORGETS, "<think>x</think>4", "<think>x</think>4", True),
        (FORGETS, "4", "4", False),
        (REASONS, "<think>x</think>4", "x\n</think>\n\n4", False),
        (REASONS, "<think>\nx\n</think>\n\n4", "x\n</think>\n\n4", False),
        (REASONS, "4", "\n</think>\n\n4", False),
    ],
)
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_an_answer_continues_the_prompt_as_the_template_writes_it(
    form, template, answer, learned, remarked, make_tokenizer, write
):
    turn = {"role": "assistant", "content": answer}
    row, field = {"prompt": [USER, turn]}, None
    if form == "prompt and completion":
        row, field = {"prompt": [USER], "completion": [turn]}, "completion"
    found = sft(row, make_tokenizer(template), field, write=write)
    assert found == (f"{learned}<|im_end|>", remarked)


@pytest.mark.parametrize(
    ("template", "text", "remarked"),
    [
        (OPENS, "x\n</think>\n\n4", False),
        (OPENS, "<think>\nx\n</think>\n\n4", True),
        (OPENS, "4", True),
        (CLOSES, "4", False),
        (CLOSES, "<think>\nx\n</think>\n\n4", True),
        (CLOSES, "<think>\n\n</think>\n\n4", True),
        (TRIMS, "<think>x</think>4", False),
        (TRIMS, "4", False),
    ],
)
def test_a_text_that_does_not_fit_the_prompt_s_tags_is_learned_and_remarked(
    template, text, remarked, make_tokenizer, write
):
    tokenizer = make_tokenizer(template)
    completions = Completions.of_student(student(tokenizer), field="completion", max_tokens=99)
    path = write({"prompt": [USER], "completion": text}, {"prompt": "<think>", "completion": "4"})
    chat, plain = load_prompts(path, tokenizer, DataConfig(), completions=completions).prompts
    assert tokenizer.decode(chat.completion_ids) == f"{text}<|im_end|>"
    assert (THINKING in chat.remarks) == remarked
    assert not plain.remarks


@pytest.mark.parametrize("prompt", [[USER], "q"])
def test_reasoning_in_a_field_of_a_completion_is_rendered(prompt, make_tokenizer, write):
    turn = {"role": "assistant", "content": "4", "reasoning_content": "x"}
    row = {"prompt": prompt, "completion": [turn]}
    found = sft(row, make_tokenizer(REASONS), "completion", chat=True, write=write)
    assert found == ("x\n</think>\n\n4<|im_end|>", False)
    assert sft(row, make_tokenizer(TRIMS), "completion", chat=True, write=write) == (
        "4<|im_end|>",
        True,
    ), "this template renders no reasoning"


@pytest.mark.parametrize("form", ["completion", None])
@pytest.mark.parametrize("call", [{"name": "look_up"}, {"function": {"name": "look_up"}}])
def test_a_tool_call_that_a_template_leaves_out_is_remarked(
    call, form, tokenizer, make_tokenizer, write
):
    turn = {"role": "assistant", "content": "hm", "tool_calls": [call]}
    row = {"prompt": [USER], "completion": [turn]} if form else {"prompt": [USER, turn]}
    assert sft(row, tokenizer, form, write=write) == ("hm<|im_end|>", True)
    renders = CHAT.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
    learned, remarked = sft(row, make_tokenizer(renders), form, write=write)
    assert "look_up" in learned
    assert not remarked


@pytest.mark.parametrize("name", ["reasoning_content", "tool_calls", "thinking"])
def test_a_field_that_plain_text_has_no_place_for_is_refused(name, tokenizer, write):
    turn = {"role": "assistant", "content": "4", name: ["x"]}
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: found {name} in the completion"):
        sft({"prompt": "q", "completion": [turn]}, tokenizer, "completion", write=write)


def sentencepiece(scheme):
    """A tokenizer that puts a space in front of every text, as SentencePiece does."""
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", *"▁\n[]/INSTq1+=abc", "▁▁"])
    inner = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "▁")], unk_token="<unk>")
    )
    if scheme == "normalizer":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
        "{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, unk_token="<unk>", eos_token="</s>"
    )


SCHEMES = ["normalizer", "first"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("prompt", [[USER], "q", "1+1="])
@pytest.mark.parametrize(
    "pieces", [["a", "b"], ["▁", "a"], ["\n", "a"], ["▁▁", "a"], ["1"], ["a", "▁", "b"]]
)
def test_generated_ids_come_back_from_their_text(pieces, prompt, scheme, write):
    tokenizer = sentencepiece(scheme)
    ids = tokenizer.convert_tokens_to_ids(pieces)
    writer = student(tokenizer, "</s>")
    completions = Completions.of_student(writer, field="completion", max_tokens=9)
    path = write({"prompt": prompt, "completion": writer.decode_all(ids)})
    (prompt,) = load_prompts(path, tokenizer, DataConfig(), completions=completions).prompts
    assert prompt.completion_ids.tolist() == [*ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("answer", ["a", "a b", "1+1=1"])
def test_an_answer_has_the_ids_of_the_whole_conversation(answer, scheme, write):
    tokenizer = sentencepiece(scheme)
    turns = [USER, {"role": "assistant", "content": answer}]
    completions = Completions.of_student(student(tokenizer, "</s>"), field=None, max_tokens=9)
    path = write({"prompt": turns})
    (prompt,) = load_prompts(path, tokenizer, DataConfig(), completions=completions).prompts
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
    assert [*prompt.token_ids.tolist(), *prompt.completion_ids.tolist()] == whole


@pytest.mark.parametrize("text", ["a", " a", "\na", "\n\n a\n", "é1"])
@pytest.mark.parametrize("chat", [True, False])
def test_bytes_are_the_same_wherever_they_stand(text, chat, tokenizer, write):
    completions = Completions.of_student(student(tokenizer), field="completion", max_tokens=99)
    path = write({"prompt": "q\n", "completion": text})
    (prompt,) = load_prompts(
        path, tokenizer, DataConfig(chat=chat), completions=completions
    ).prompts
    assert prompt.completion_ids.tolist()[:-1] == tokenizer(text)["input_ids"]
    assert student(tokenizer).decode_all(prompt.completion_ids.tolist()[:-1]) == text


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
