"""Data sets as people have them: lists, globs, saved folders, the hub; mixtures, limits, streaming."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from opd.config.data import DataConfig
from opd.config.sources import data_sources, source_paths
from opd.data.prompts import load_prompts
from opd.data.source_rows import UniqueUids, numbered_rows, source_rows
from opd.data.spool import SpooledPrompts
from opd.data.stream import ShuffledPrompts


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(*texts, **more):
    return [{"prompt": text, **more} for text in texts]


def jsonl(name, given):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return name


def parquet(name, given):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), name)
    return name


def load(source, tokenizer, **settings):
    known = {"max_prompt_tokens_of_model": "max_prompt_tokens", "answers": "answers"}
    own = {known[key]: settings.pop(key) for key in list(settings) if key in known}
    return load_prompts(source, tokenizer, DataConfig(**settings), **own)


def texts(loaded):
    return [prompt.text for prompt in loaded.prompts]


def test_a_list_reads_its_entries_one_after_the_other(tokenizer):
    source = [jsonl("b.jsonl", rows("b1", "b2")), parquet("a.parquet", rows("a1"))]
    loaded = load(source, tokenizer)
    assert texts(loaded) == ["b1", "b2", "a1"]
    assert [prompt.uid for prompt in loaded.prompts] == ["0:0", "0:1", "1:0"]


def test_uids_of_several_sources_never_meet(tokenizer):
    one, other = rows("a", uid="x"), rows("b", uid="x")
    loaded = load([jsonl("a.jsonl", one), jsonl("b.jsonl", other)], tokenizer)
    assert [prompt.uid for prompt in loaded.prompts] == ["0:x", "1:x"]
    with pytest.raises(ValueError, match=r"c\.jsonl:2: found uid 'x' again, first at c\.jsonl:1"):
        load(jsonl("c.jsonl", one + other), tokenizer)
    with pytest.raises(
        ValueError, match=r"d/2\.jsonl:1: found uid 'x' again, first at d/1\.jsonl:1"
    ):
        load([jsonl("d/1.jsonl", one) and jsonl("d/2.jsonl", other) and "d/*.jsonl"], tokenizer)


def test_a_glob_reads_its_files_in_sorted_order_and_numbers_their_rows_on(tokenizer):
    for name in ("part-2", "part-10", "part-1"):
        jsonl(f"deep/er/{name}.jsonl", rows(name))
    loaded = load("deep/**/part-*.jsonl", tokenizer)
    assert texts(loaded) == ["part-1", "part-10", "part-2"]
    assert [prompt.uid for prompt in loaded.prompts] == ["0", "1", "2"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tokenizer):
    assert texts(load(jsonl("a[1].jsonl", rows("x")), tokenizer)) == ["x"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none-*.jsonl", "no file matches"),
        ("*.txt", r"a\.txt: found a file of an unknown kind"),
        ([], "data.train is an empty list"),
        ([3], "found '3'; expected a path"),
        (None, "found 'None'; expected a path"),
        ([{"weight": 2}], "expected a path"),
        (
            [{"path": "a.jsonl", "spilt": "x"}],
            "a.jsonl has the unknown setting 'spilt'; allowed are path",
        ),
        ([{"path": "a.jsonl", "eval_split": "x"}], "unknown setting 'eval_split'"),
        ([{"path": "a.jsonl", "streaming": True}], "unknown setting 'streaming'"),
        ([{"path": "a.jsonl", "limit": "ten"}], "a.jsonl: .*'ten'.*correct it"),
        ([{"path": "a.jsonl", "weight": 0}], "weight 0; allowed is a number above 0"),
        ([{"path": "a.jsonl", "weight": True}], "weight True; allowed"),
        ([{"path": "a.jsonl", "weight": 1}, "a.jsonl"], "a weight for 1 of 2 data sets"),
    ],
)
def test_a_source_of_another_form_is_one_sentence(source, words, tokenizer):
    jsonl("a.jsonl", rows("x"))
    Path("a.txt").write_text("x")
    with pytest.raises(ValueError, match=words) as refused:
        load(source, tokenizer)
    assert "\n" not in str(refused.value)


def test_an_entry_has_settings_of_its_own(tokenizer):
    verl = [{"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "3"}}]
    source = [
        {"path": parquet("verl.parquet", verl), "answer_field": "reward_model.ground_truth"},
        {"path": jsonl("plain.jsonl", rows("a", "b", answer="4")), "limit": 1, "chat": True},
    ]
    loaded = load(source, tokenizer, system="s")
    assert [(p.text, p.answer) for p in loaded.prompts] == [
        ("<system>s<user>q<assistant>", "3"),
        ("<system>s<user>a<assistant>", "4"),
    ]


def test_paths_of_any_value_are_listed():
    assert source_paths(["a", {"path": "b", "weight": 1}, 3, {}]) == ["a", "b"]
    assert source_paths("a") == ["a"]
    assert source_paths(None) == []


def test_a_saved_folder_is_read_with_and_without_splits(tokenizer):
    one = datasets.Dataset.from_list(rows("a", answer="1"))
    one.save_to_disk("set")
    datasets.DatasetDict(
        {"train": one, "test": datasets.Dataset.from_list(rows("b"))}
    ).save_to_disk("splits")
    assert texts(load("set", tokenizer)) == ["a"]
    assert texts(load("splits", tokenizer)) == ["a"]
    assert texts(load("splits", tokenizer, split="test")) == ["b"]
    with pytest.raises(
        ValueError, match=r"splits: found no split 'dev'; the folder has train, test"
    ):
        load("splits", tokenizer, split="dev")
    (place, _) = next(source_rows("splits", DataConfig()))
    assert place == "splits[train]: row 1"
    Path("set/state.json").write_text("{")
    with pytest.raises(ValueError, match="set: cannot be read as a folder of save_to_disk"):
        load("set", tokenizer)


CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main.jsonl}]
- config_name: other
  data_files: [{split: train, path: other.jsonl}]
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_with_subsets_is_read_by_subset(streaming, tokenizer):
    """A folder with a card is what the hub has; load_dataset reads both in the same way."""
    jsonl("owner/name/main.jsonl", rows("a"))
    jsonl("owner/name/other.jsonl", rows("b"))
    Path("owner/name/README.md").write_text(CARD)
    assert texts(load("owner/name", tokenizer, subset="other", streaming=streaming)) == ["b"]
    with pytest.raises(ValueError, match="owner/name: cannot load split 'train' of subset 'none'"):
        load("owner/name", tokenizer, subset="none", streaming=streaming)


def test_a_revision_goes_to_the_hub_and_to_the_same_held_out_set(tokenizer, monkeypatch):
    calls = []

    def load_dataset(*arguments, **named):
        calls.append((arguments, named))
        return datasets.Dataset.from_list(rows("a"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataConfig(train="o/n", eval="o/n", subset="main", revision="abc", eval_split="test")
    load_prompts("o/n", tokenizer, data)
    load_prompts("o/n", tokenizer, data.for_eval())
    revisions = [(named["split"], named["revision"]) for _, named in calls]
    assert revisions == [("train", "abc"), ("test", "abc")]
    assert calls[0][0] == ("o/n", "main")
    other = DataConfig(train="o/n", eval="o/m", revision="abc")
    assert other.for_eval().revision is None
    assert DataConfig(train="a", eval="b", eval_revision="x").for_eval().revision == "x"
    with pytest.warns(UserWarning, match="revision=abc has no effect on a.jsonl"):
        load(jsonl("a.jsonl", rows("a")), tokenizer, revision="abc")


LENGTHS = [3, 9, 4, 12, 8]


@pytest.mark.parametrize("streaming", [False, True])
def test_long_prompts_are_refused_or_dropped_with_their_number(streaming, tokenizer):
    path = jsonl("a.jsonl", rows(*("x" * length for length in LENGTHS)))
    settings = {"max_prompt_tokens": 8, "streaming": streaming}
    with pytest.raises(
        ValueError,
        match=r"a\.jsonl:2: found a prompt of 9 tokens; allowed: 8, the first "
        r"of 2 of 5 rows that are longer; .* data\.filter_overlong_prompts=true",
    ):
        load(path, tokenizer, **settings)
    loaded = load(path, tokenizer, filter_overlong_prompts=True, **settings)
    assert [len(prompt.token_ids) for prompt in loaded.prompts] == [3, 4, 8]
    assert [prompt.uid for prompt in loaded.prompts] == ["0", "2", "4"], "rows keep their uids"
    assert loaded.longest == 8
    (note,) = loaded.notes
    assert "2 of the 5 prompts of data.train are too long and are dropped" in note
    assert "a.jsonl:2" in note
    assert load(path, tokenizer).notes == ()


def test_the_model_s_own_limit_holds_too(tokenizer):
    path = jsonl("a.jsonl", rows("x" * 5))
    settings = {"max_prompt_tokens": 8, "max_prompt_tokens_of_model": 4}
    with pytest.raises(ValueError, match="of 5 tokens; allowed: 4"):
        load(path, tokenizer, **settings)
    with pytest.raises(ValueError, match=r"a\.jsonl: found no rows \(1 of the 1 prompts"):
        load(path, tokenizer, filter_overlong_prompts=True, **settings)


def test_dropped_rows_need_no_answer(tokenizer):
    from opd.data.prompts import RequiredAnswers

    path = jsonl("a.jsonl", [{"prompt": "x" * 9}, {"prompt": "x", "answer": "1"}])
    needed = RequiredAnswers(who="w", setting="s")
    settings = {"max_prompt_tokens": 8, "filter_overlong_prompts": True, "answers": needed}
    assert texts(load(path, tokenizer, **settings)) == ["x"]


def test_streamed_prompts_are_those_in_memory(tokenizer):
    given = [{"prompt": "p" * (1 + i % 7), "answer": str(i), "hint": "h"} for i in range(50)]
    source = [jsonl("a.jsonl", given), {"path": parquet("b.parquet", given), "limit": 20}]
    settings = {"teacher_template": "{prompt}{hint}"}
    memory = load(source, tokenizer, **settings)
    spooled = load(source, tokenizer, streaming=True, **settings)
    assert isinstance(spooled.prompts, SpooledPrompts)
    assert (spooled.groups, spooled.longest, spooled.teacher_longest) == (
        memory.groups, memory.longest, memory.teacher_longest,
    )  # fmt: skip
    assert len(spooled.prompts) == len(memory.prompts) == 70

    def facts(prompt):
        arrays = prompt.token_ids.tolist(), prompt.teacher_ids.tolist()
        return prompt.uid, prompt.text, prompt.answer, *arrays

    assert list(map(facts, spooled.prompts)) == list(map(facts, memory.prompts))
    assert facts(spooled.prompts[-1]) == facts(memory.prompts[-1])
    assert list(map(facts, spooled.prompts[3:9:2])) == list(map(facts, memory.prompts[3:9:2]))
    with pytest.raises(IndexError):
        spooled.prompts[70]
    orders = [ShuffledPrompts(each.prompts, 8, seed=3) for each in (spooled, memory)]
    for step in (0, 5, 11):
        first, second = (list(map(facts, order.take(step))) for order in orders)
        assert first == second


def test_uids_with_one_hash_are_compared_themselves(monkeypatch):
    uids = UniqueUids()
    monkeypatch.setitem(UniqueUids.add.__globals__, "hash", lambda text: 7)
    sources = data_sources("data.train", jsonl("a.jsonl", rows("a", "b")), DataConfig())
    for row in numbered_rows(sources):
        uids.add(row.uid)
    uids.require(lambda: numbered_rows(sources))
    with pytest.raises(ValueError, match="found uid '0' again"):
        uids.require(lambda: iter([*numbered_rows(sources), *numbered_rows(sources)]))
