"""The lines of a generated data set: the row, its uid, and text that tokenises back."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.assembly.rollout import EngineInputs
from opd.data.tokenizer import StudentTokenizer
from opd.run.generate import _line, _rows, generate
from opd.run.recipe import composed, find_recipe
from opd.types import FinishReason, Prompt, Rollout

QUICKSTART = find_recipe("quickstart")


def student() -> StudentTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken("<eos>", special=True), AddedToken("<think>", special=True)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", clean_up_tokenization_spaces=True
    )
    return StudentTokenizer(
        tokenizer=tokenizer,
        declared_stop_ids=[tokenizer.eos_token_id],
        turn_end_id=tokenizer.eos_token_id,
        pad_id=0,
        max_length=10,
        vocab_size=len(tokenizer),
    )


@pytest.mark.parametrize("text", ["x != y . z , w ?", " it 's .\n", "<think>a . </think> b"])
@pytest.mark.parametrize("sample", [0, 2])
def test_a_line_s_completion_tokenises_back(text: str, sample: int) -> None:
    tokenizer = student()
    ids = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
    rollout = Rollout(
        prompt=Prompt(uid="u", token_ids=np.array([5], np.int32)),
        token_ids=np.array([*ids, tokenizer.end_id], np.int32),
        logps=np.zeros(len(ids) + 1, np.float32),
        finish_reason=FinishReason.stop,
        version=0,
        sample=sample,
    )
    line = _line(rollout, {"u": {"prompt": "x", "uid": None}}, tokenizer)
    assert tokenizer.tokenizer(line["completion"], add_special_tokens=False)["input_ids"] == ids
    assert line["uid"] == ("u" if sample == 0 else "u#2")


@pytest.mark.parametrize(
    ("uids", "expected"),
    [([None, None], ["0", "1"]), (["a", None], ["a", "1"]), ([7, "b"], ["7", "b"]), ([], ["0"])],
)
def test_rows_are_found_by_the_uids_of_their_prompts(
    uids: list[object], expected: list[str], tmp_path: Path
) -> None:
    rows = [{"uid": uid, "prompt": "1+2="} for uid in uids] or [{"prompt": "1+2="}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = composed(QUICKSTART, [f"data.train={path}"]).config
    assert dict(_rows(config)) == dict(zip(expected, rows, strict=True))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({}, r"rows\.jsonl:2: .* first of 1 of 2 rows.*the grader"),
        ({"answer": ""}, r"rows\.jsonl:2: .* first of 1 of 2 rows.*the grader"),
        ({"answer": "four"}, r"prompt 1: found the answer 'four' without a number"),
        ({"answer": ["four", "vier"]}, r"prompt 1: found the answer .* without a number"),
        ({"answer": "1/2"}, r"prompt 1: found the answer '1/2' with 2 numbers.*use math"),
        ({"answer": ["4", "12:30 to 13:45"]}, r"prompt 1: found the answer .* with 4 numbers"),
    ],
)
def test_only_correct_needs_answers_before_a_model_is_loaded(
    second: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "1+3="} | second]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["rollout=transformers", "eval.grader=number", f"data.train={path}"]
    recipe = composed(QUICKSTART, settings)
    with pytest.raises(ValueError, match=words):
        generate(recipe, model=None, out=str(tmp_path / "out.jsonl"), only_correct=True)


class _EngineBuilt(Exception):
    pass


@pytest.mark.parametrize(
    ("held_out", "settings"),
    [
        ({"prompt": "1+3="}, []),
        ({"prompt": "1+3=", "answer": "four"}, ["eval.grader=number"]),
        ({"prompt": "1+" * 9000, "answer": "4"}, []),
        ({"prompt": "1+3=", "answer": "4"}, ["eval.kl_data=absent.jsonl"]),
    ],
    ids=["no answer", "no number", "too long", "divergence"],
)
@pytest.mark.parametrize("only_correct", [True, False])
def test_held_out_prompts_are_not_read(
    only_correct: bool,
    held_out: dict[str, object],
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(inputs: EngineInputs) -> None:
        raise _EngineBuilt

    monkeypatch.setattr("opd.run.engine.build_engine", build)
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}')
    (tmp_path / "eval.jsonl").write_text(json.dumps(held_out))
    own = [f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/eval.jsonl"]
    recipe = composed(QUICKSTART, ["rollout=transformers", *own, *settings])
    with pytest.raises(_EngineBuilt):
        generate(recipe, model=None, out=str(tmp_path / "out.jsonl"), only_correct=only_correct)


@pytest.mark.parametrize("more", ['"cut \\ud83d"', '["\\udc00"]', '{"x": "\\ud83d"}'])
def test_a_row_that_cannot_be_written_is_named_before_anything_is_generated(
    more: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "1+2=", "more": {more}}}')
    config = composed(QUICKSTART, [f"data.train={path}"]).config
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: cannot be written as JSON"):
        list(_rows(config))
