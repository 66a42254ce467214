"""Teachers whose ids mean the student's tokens, and others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from opd.teacher.model_info import read_head, read_info
from opd.teacher.vocabulary import (
    Vocabulary,
    common_vocab_size,
    fingerprint,
    fits,
    read_vocabulary,
    require_fit,
)
from opd.types import TeacherInfo


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    ids = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="a")))


def _info(tokenizer: PreTrainedTokenizerFast, rows: int) -> TeacherInfo:
    return TeacherInfo(
        model="teacher",
        vocab_size=rows,
        hidden_size=4,
        tokenizer_fingerprint=fingerprint(tokenizer),
        tokenizer_size=len(tokenizer),
        max_length=16,
    )


def test_one_family_padded_differently_fits_at_the_smaller_size() -> None:
    tokenizer = _tokenizer(["a", "b", "c"])
    info = _info(tokenizer, rows=152064)
    student = read_vocabulary(tokenizer, matrix_size=151936)
    assert fits(info, student) is None
    assert common_vocab_size(151936, info) == 151936
    assert require_fit(info, student) == 151936
    assert require_fit(replace(info, vocab_size=128), student) == 128


def test_the_same_words_under_other_ids_do_not_fit() -> None:
    info = _info(_tokenizer(["a", "b", "c"]), rows=3)
    student = read_vocabulary(_tokenizer(["a", "c", "b"]), matrix_size=3)
    with pytest.raises(ValueError, match="another tokenizer"):
        require_fit(info, student)


def test_a_server_with_another_tokenizer_than_the_named_model_is_refused_by_that_name() -> None:
    info = _info(_tokenizer(["a", "b", "c"]), rows=3)
    named = replace(
        read_vocabulary(_tokenizer(["a", "c", "b"]), matrix_size=3),
        owner="teacher.model=m",
        remedy="name the model that the server has",
    )
    assert fits(info, replace(named, fingerprint=info.tokenizer_fingerprint)) is None
    with pytest.raises(ValueError, match=r"than teacher\.model=m .*; name the model"):
        require_fit(info, named)


def test_a_head_smaller_than_the_tokenizer_does_not_fit() -> None:
    tokenizer = _tokenizer(["a", "b", "c"])
    reason = fits(_info(tokenizer, rows=2), read_vocabulary(tokenizer, 3))
    assert reason is not None
    assert "output rows for 2 only" in reason


def test_fingerprint_is_that_of_the_checkpoint(checkpoint: Path, student: Vocabulary) -> None:
    info = read_info(str(checkpoint), max_length=9)
    assert info.tokenizer_fingerprint == student.fingerprint
    assert (info.vocab_size, info.tokenizer_size, info.max_length) == (97, 90, 9)


def test_the_head_is_found_alone_under_a_prefix_or_tied(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    head_VD, embedding_VD = tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]
    assert torch.equal(read_head(str(checkpoint)), head_VD)
    _save(tmp_path, tensors | {"language_model.lm_head.weight": head_VD.bfloat16()})
    assert torch.equal(read_head(str(tmp_path)), head_VD.bfloat16().float())
    _save(tmp_path, tensors)
    with pytest.raises(ValueError, match="as the output head and found none"):
        read_head(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    assert torch.equal(read_head(str(tmp_path)), embedding_VD)


def test_files_beside_the_teacher_do_not_change_its_head(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    _save(tmp_path, tensors)
    stale = {"lm_head.weight": torch.zeros(2, 2)}
    save_file(stale, tmp_path / "old.safetensors")
    index = {"weight_map": {"lm_head.weight": "old.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(read_head(str(tmp_path)), tensors["lm_head.weight"])


def test_heads_that_are_no_plain_matrix_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, {"lm_head.weight": torch.ones(2, 2), "lm_head.bias": torch.ones(2)})
    with pytest.raises(ValueError, match="bias"):
        read_head(str(tmp_path))
    _save(tmp_path, {"lm_head.qweight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="unquantised"):
        read_head(str(tmp_path))


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
