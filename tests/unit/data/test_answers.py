"""Answers: texts, numbers, alternatives, fields inside structs, and rows that have none."""

import json
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from opd.config.data import DataConfig
from opd.data.columns import read_answer
from opd.data.prompts import RequiredAnswers, load_prompts

GRADED = RequiredAnswers(who="reward=grader", setting="data.answer_field")


def answers(path, tokenizer, required=None, **settings):
    prompts = load_prompts(path, tokenizer, DataConfig(**settings), answers=required).prompts
    return [prompt.answer for prompt in prompts]


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("4", "4"),
        (4, "4"),
        (4.0, "4"),
        (-0.5, "-0.5"),
        (1e16, "10000000000000000"),
        (1e-7, "0.0000001"),
        (True, "true"),
        (False, "false"),
        (["x", "y"], ("x", "y")),
        (["x"], ("x",)),
        ([4, 4.5, "four"], ("4", "4.5", "four")),
        (["a|b", "c"], ("a|b", "c")),
        (["", "x", None], ("x",)),
        ([], None),
        (None, None),
        ("", None),
        (" \n", None),
        (float("nan"), None),
        (float("inf"), None),
        ([float("nan"), float("-inf"), "x"], ("x",)),
        (-0.0, "0"),
        ("[1,2]", "[1,2]"),
        ("['a'", "['a'"),
        ("f(['a'])", "f(['a'])"),
        (["['a', 'b']"], ("['a', 'b']",)),
    ],
)
def test_an_answer_is_plain_text_and_a_list_alternatives(value, answer, tokenizer, write):
    assert answers(write({"prompt": "q", "answer": value}), tokenizer) == [answer]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "function"])
def test_answers_of_every_source_are_alike(kind, tokenizer, tmp_path):
    rows = [{"prompt": "q", "answer": [1.0, 2.5]}, {"prompt": "q", "answer": []}]
    path = tmp_path / f"rows.{kind}"
    settings = {}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    if kind == "function":
        code = (
            "import numpy\ndef f(row):\n    return row | {'answer': numpy.array(row['answer'])}\n"
        )
        (tmp_path / "rows.py").write_text(code)
        settings["function"] = f"{tmp_path / 'rows.py'}:f"
    assert answers(str(path), tokenizer, **settings) == [("1", "2.5"), None]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"reward_model": {"style": "rule", "ground_truth": "4"}}, "reward_model.ground_truth"),
        ({"a": {"b": {"c": 4}}}, "a.b.c"),
        ({"a.b": {"c": "4"}}, "a.b.c"),
        ({"a.b": "4", "a": {"b": "5"}}, "a.b"),
    ],
)
def test_an_answer_is_read_inside_structs(row, field, tokenizer, write):
    path = write({"prompt": "q"} | row)
    assert answers(path, tokenizer, required=GRADED, answer_field=field) == ["4"]


def test_the_regex_extracts_from_every_alternative(tokenizer, write):
    path = write({"prompt": "q", "answer": ["so #1", "or #2"]})
    assert answers(path, tokenizer, answer_regex="#(.+)") == [("1", "2")]


@pytest.mark.parametrize(
    ("rows", "first", "count"),
    [
        ([{}, {}, {}], 1, 3),
        ([{"answer": "1"}, {}, {"answer": "2"}, {"answer": None}], 2, 2),
        ([{"answer": "1"}, {"answer": ""}], 2, 1),
        ([{"answer": ["1"]}, {"answer": "2"}, {"answer": []}], 3, 1),
    ],
)
def test_rows_without_a_required_answer_are_refused_with_place_and_number(
    rows, first, count, tokenizer, write
):
    path = write(*({"prompt": "q"} | row for row in rows))
    assert None in answers(path, tokenizer), "nobody needs them"
    with pytest.raises(ValueError, match=rf"rows\.jsonl:{first}: ") as refused:
        answers(path, tokenizer, required=GRADED)
    assert f"the first of {count} of {len(rows)} rows without one" in str(refused.value)
    assert "reward=grader" in str(refused.value)
    assert "data.answer_field" in str(refused.value)


def test_the_fields_there_are_help_to_name_the_right_one(tokenizer, write):
    path = write({"prompt": "q", "reward_model": {"ground_truth": "4"}})
    with pytest.raises(ValueError, match=r"'reward_model\.ground_truth'"):
        answers(path, tokenizer, required=GRADED, answer_field="ground_truth")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (np.float32(0.1), "0.1"),
        (np.float16(0.1), "0.1"),
        (np.array([0.1, 2.5], np.float32), ("0.1", "2.5")),
        (np.array(5), "5"),
        (np.array(0.1, np.float32), "0.1"),
        (np.array("x"), "x"),
        (np.bool_(True), "true"),
        (np.array([True, False]), ("true", "false")),
        (np.int64(7), "7"),
        (Decimal("5.00"), "5"),
        (Decimal("2.50"), "2.5"),
        (Decimal("-0.00"), "0"),
        (Decimal("1E+3"), "1000"),
        (Decimal("NaN"), None),
        (Decimal("Infinity"), None),
        (np.float32("nan"), None),
        (np.array(np.nan), None),
        (np.array([np.inf, 1]), ("1",)),
        (10**400, str(10**400)),
    ],
)
def test_numbers_of_every_library_are_read(value, answer):
    assert read_answer("here", {"answer": value}, "answer", None) == answer


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_narrow_floats_are_as_short_as_they_were_written(source, kind, tokenizer, tmp_path):
    number = pyarrow.float16() if kind == "float16" else pyarrow.float32()
    values = [np.dtype(kind).type(x) for x in (0.1, 2.5)]
    columns = {
        "prompt": ["q", "q"],
        "answer": pyarrow.array(values, number),
        "list": pyarrow.array([[values[0], None], []], pyarrow.list_(number)),
        "in": pyarrow.array(
            [{"x": values[0], "y": "z"}, None],
            pyarrow.struct([("x", number), ("y", pyarrow.string())]),
        ),
    }
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    path = str(path if source == "parquet" else tmp_path)
    assert answers(path, tokenizer) == ["0.1", "2.5"]
    assert answers(path, tokenizer, answer_field="list") == [("0.1",), None]
    assert answers(path, tokenizer, answer_field="in.x") == ["0.1", None]
    assert answers(path, tokenizer, answer_field="in.y") == ["z", None]
    (prompt, _) = load_prompts(path, tokenizer, DataConfig(template="{prompt} {answer}")).prompts
    assert prompt.text == "q 0.1"


@pytest.mark.parametrize(
    "text",
    [
        "['four', '4']",
        '["a", "b"]',
        "['a' 'b']",
        "['a'\n 'b']",
        "['one']",
        "['four', 4, None]",
        """["it's", 'b']""",
        " [ 'a', ] ",
        "['a, ]', 'b']",
    ],
)
def test_a_list_of_answers_written_as_text_is_refused(text, tokenizer, write):
    path = write({"prompt": "q", "answer": text})
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: found a list of answers written"
    ) as found:
        answers(path, tokenizer)
    assert "data.function" in str(found.value)


@pytest.mark.parametrize("regex", ["(A)?#### ", "(x)|####", "#(#### )?"])
def test_a_group_that_did_not_match_finds_nothing(regex, tokenizer, write):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: data\.answer_regex.*finds nothing in"):
        answers(write({"prompt": "q", "answer": "#### 5"}), tokenizer, answer_regex=regex)


@pytest.mark.parametrize("value", [{"a": 1}, [{"a": 1}], [["x"]]])
def test_an_answer_of_another_type_is_named(value, tokenizer, write):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: found an answer of"):
        answers(write({"prompt": "q", "answer": value}), tokenizer)
