"""Prompts from files: what is read, and how each kind of wrong row is named."""

import gzip
import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from opd.config.data import DataConfig
from opd.data.prompts import load_prompts


def load(source, tokenizer, max_prompt_tokens=None, **settings):
    return load_prompts(
        source, tokenizer, DataConfig(**settings), max_prompt_tokens=max_prompt_tokens
    ).prompts


def test_a_row_becomes_a_tokenised_prompt(tokenizer, write):
    (prompt,) = load(write({"prompt": "1+1=", "answer": 2}), tokenizer)
    assert (prompt.uid, prompt.text, prompt.answer) == ("0", "1+1=", "2")
    assert prompt.token_ids.dtype == np.int32
    assert tokenizer.decode(prompt.token_ids) == "1+1="


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_file_kind_gives_the_same_prompts(kind, tokenizer, tmp_path):
    rows = [{"prompt": "say, \u2028 «a»\nb", "answer": "x"}, {"prompt": "c", "answer": "y"}]
    path = tmp_path / f"rows.{kind}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    match kind:
        case "jsonl":
            path.write_text("\ufeff" + lines, encoding="utf-8")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case "csv":
            path.write_text(f'prompt,answer\n"{rows[0]["prompt"]}",x\nc,y\n', encoding="utf-8")
        case "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    prompts = load(str(path), tokenizer)
    assert [(p.text, p.answer) for p in prompts] == [(r["prompt"], r["answer"]) for r in rows]


def test_messages_take_the_chat_template_and_the_system_prompt(tokenizer, write):
    path = write({"prompt": [{"role": "user", "content": "hi"}]})
    assert load(path, tokenizer)[0].text == "<user>hi<assistant>"
    (prompt,) = load(path, tokenizer, system="be kind")
    assert prompt.text == "<system>be kind<user>hi<assistant>"


def test_a_string_takes_the_chat_template_only_when_asked(tokenizer, write):
    path = write({"prompt": "hi"})
    assert load(path, tokenizer)[0].text == "hi"
    assert load(path, tokenizer, chat=True)[0].text == "<user>hi<assistant>"
    with pytest.warns(UserWarning, match="system has no effect"):
        assert load(path, tokenizer, system="x")[0].text == "hi"


def test_a_template_and_an_answer_regex_read_gsm8k(tokenizer, write):
    path = write({"question": "How many?", "answer": "so 6*7=42\n#### 1,042"})
    (prompt,) = load(path, tokenizer, template="Q: {question}\nA: {{", answer_regex=r"#### (.+)")
    assert (prompt.text, prompt.answer) == ("Q: How many?\nA: {", "1,042")


def test_a_template_calls_the_prompt_field_prompt(tokenizer, write):
    path = write({"question": "hi"})
    (prompt,) = load(path, tokenizer, prompt_field="question", template="<{prompt}>")
    assert prompt.text == "<hi>"


def test_limit_takes_the_first_rows_and_reads_no_further(tokenizer, write):
    path = write({"prompt": "a"}, {"prompt": "b"}, "{broken")
    assert [p.text for p in load(path, tokenizer, limit=2)] == ["a", "b"]


WRONG_ROWS = {
    "malformed": ('{"prompt": "x"', r"rows\.jsonl:2: malformed JSON"),
    "list": ("[1]", r"rows\.jsonl:2: found a JSON list; expected an object"),
    "missing": ({"question": "x"}, r"rows\.jsonl:2: no field 'prompt'; found 'question'"),
    "type": ({"prompt": 3}, r"rows\.jsonl:2: found a prompt of type int"),
    "empty": ({"prompt": "  "}, r"rows\.jsonl:2: the prompt is empty"),
    "no messages": ({"prompt": []}, r"rows\.jsonl:2: the prompt is empty"),
    "message": ({"prompt": [{"role": "user"}]}, r"rows\.jsonl:2: message 1 is"),
    "null": ({"prompt": None}, r"rows\.jsonl:2: found a prompt of null"),
    "answer": (
        {"prompt": "x", "answer": {"text": "y"}},
        r"rows\.jsonl:2: found an answer of a struct .* dotted path",
    ),
    "uid": ({"prompt": "x", "uid": [1]}, r"rows\.jsonl:2: found uid \[1\]"),
    "again": ({"prompt": "x", "uid": "0"}, r"rows\.jsonl:2: found uid '0' again, first at .*:1"),
    "long": ({"prompt": "x" * 9}, r"rows\.jsonl:2: found a prompt of 9 tokens; allowed: 8"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_wrong_row_is_named_with_file_and_line(case, tokenizer, write):
    row, message = WRONG_ROWS[case]
    with pytest.raises(ValueError, match=message):
        load(write({"prompt": "fine"}, row), tokenizer, max_prompt_tokens=8)


def test_a_wrong_setting_is_named(tokenizer, write):
    path = write({"prompt": [{"role": "user", "content": "x"}], "answer": "four"})
    with pytest.raises(
        ValueError, match="the template needs the field 'question'; found the fields"
    ):
        load(path, tokenizer, template="{question}")
    with pytest.raises(ValueError, match="finds nothing in 'four'"):
        load(path, tokenizer, answer_regex=r"\d+")
    with pytest.raises(ValueError, match="not a regular expression"):
        load(path, tokenizer, answer_regex="(")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no chat template"):
        load(path, bare)


def test_a_wrong_file_is_named(tokenizer, tmp_path):
    def load_file(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return load(str(path), tokenizer)

    with pytest.raises(ValueError, match="no such file"):
        load(str(tmp_path / "absent.jsonl"), tokenizer)
    with pytest.raises(ValueError, match=r"unknown kind; allowed: \.jsonl"):
        load_file("rows.txt", b"x")
    with pytest.raises(ValueError, match="found no rows"):
        load_file("empty.jsonl", b"\n\n")
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: found bytes that are not UTF-8"):
        load_file("latin.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}')
    with pytest.raises(ValueError, match="cannot be read"):
        load_file("cut.jsonl.gz", gzip.compress(b"{}")[:-4])
    with pytest.raises(ValueError, match="expected a list of objects"):
        load_file("object.json", b"{}")
    with pytest.raises(ValueError, match=r"short\.csv:2: found a row with fewer cells"):
        load_file("short.csv", b"prompt,answer\nx\n")
    with pytest.raises(ValueError, match=r"twice\.csv:1: found the column 'prompt' twice"):
        load_file("twice.csv", b"prompt,answer,prompt\nx,y,z\n")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_file("bad.parquet", b"nonsense")


def test_a_data_set_folder_is_read_by_split(tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "b"}\n')
    assert [p.text for p in load(str(tmp_path), tokenizer, split="test")] == ["b"]
    with pytest.raises(ValueError, match="cannot load split 'absent'"):
        load(str(tmp_path), tokenizer, split="absent")


def test_a_subset_of_a_file_warns_that_it_has_no_effect(tokenizer, write):
    with pytest.warns(UserWarning, match="subset=main has no effect"):
        load(write({"prompt": "a"}), tokenizer, subset="main")


@pytest.mark.parametrize("read", [True, False], ids=["read", "not read"])
def test_a_cell_of_a_csv_may_be_longer_than_python_s_limit(read, tokenizer, tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(f"prompt,trace\n{'y' * 200_000 if read else 'x'},{'z' * 140_000}\n")
    (prompt,) = load(str(path), tokenizer)
    assert len(prompt.token_ids) == (200_000 if read else 1)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_null_uid_is_no_uid(kind, tokenizer, tmp_path):
    rows = [{"uid": None, "prompt": "a"}, {"uid": "x", "prompt": "b"}, {"uid": None, "prompt": "c"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "\n".join(map(json.dumps, rows))
        path.write_text(lines if kind == "jsonl" else json.dumps(rows))
    assert [p.uid for p in load(str(path), tokenizer)] == ["0", "x", "2"]


@pytest.mark.parametrize("field", ["extra.question", "extra.deep.question", "a.b"])
def test_a_dotted_path_reads_the_prompt_inside_structs(field, tokenizer, write):
    row = {"a.b": "hi", "extra": {"question": "hi", "deep": {"question": "hi"}}}
    assert load(write(row), tokenizer, prompt_field=field)[0].text == "hi"


@pytest.mark.parametrize("field", ["extra.absent", "question.text", "extra"])
def test_a_dotted_path_that_leads_nowhere_is_named_with_what_there_is(field, tokenizer, write):
    path = write({"question": "x", "extra": {"question": "hi"}})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1") as refused:
        load(path, tokenizer, prompt_field=field)
    assert "extra.question" in str(refused.value) or "type dict" in str(refused.value)


CUT = '"hi \\ud83d"'
"""JSON text of half a surrogate pair."""


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ('{"prompt": %s}', "prompt"),
        ('{"prompt": [{"role": "user", "content": %s}]}', "prompt"),
        ('{"prompt": "q", "hint": %s}', "prompt"),
        ('{"prompt": "q", "answer": %s}', "answer"),
        ('{"prompt": "q", "answer": ["x", %s]}', "answer"),
        ('{"prompt": "q", "uid": %s}', "uid"),
    ],
)
def test_half_of_a_surrogate_pair_is_named_with_its_row(row, kind, tokenizer, write):
    path = write('{"prompt": "fine", "hint": "h"}', row.replace("%s", CUT))
    template = "{prompt}{hint}" if "hint" in row else None
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: found half of a .* in the {kind} near"):
        load(path, tokenizer, template=template)


def test_a_whole_surrogate_pair_is_a_character(tokenizer, write):
    row = json.dumps({"prompt": "hi \U0001f600"}, ensure_ascii=True)
    assert load(write(row), tokenizer)[0].text == "hi \U0001f600"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
        ("9" * 5000, "an integer of more than 4300 digits"),
        ("[-" + "9" * 5000 + "]", "an integer of more than 4300 digits"),
    ],
    ids=["lists", "objects", "integer", "negative"],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_that_cannot_be_held_is_one_sentence(kind, value, words, tokenizer, write):
    row = f'{{"prompt": "a", "more": {value}}}'
    if kind == "jsonl":
        path, place = write({"prompt": "a"}, row), r"rows\.jsonl:2: found"
    else:
        path, place = write(f"[{row}]", name="rows.json"), r"rows\.json: found"
    with pytest.raises(ValueError, match=place) as refused:
        load(path, tokenizer)
    assert words in str(refused.value)


def test_a_dotted_path_names_the_teacher(tokenizer, write):
    path = write({"prompt": "a", "meta": {"teacher": "mathematician"}})
    assert load(path, tokenizer, teacher_field="meta.teacher")[0].teacher == "mathematician"
