"""Two tokenizations of one text: spans cover it once, in order, and cannot be divided further."""

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from opd.data.tokenizer import adds_first_space
from opd.teacher.alignment import Span, align, shared_logps
from opd.teacher.own_tokenizer import Ends, TokenizerPair
from opd.teacher.token_text import TokenBytes, written_text
from opd.types import FinishReason, Prompt, Rollout
from tests.support.tokenizers import KINDS, byte_level, random_text

STRINGS = 10_000


@cache
def pair_of(student: str, teacher: str) -> TokenizerPair:
    own, other = tokenizer(student), tokenizer(teacher)
    return TokenizerPair(
        own,
        other,
        student_ends=ends(own),
        teacher_ends=ends(other),
        first_space=adds_first_space(other),
    )


@cache
def tokenizer(kind: str):
    return KINDS[kind]()


def ends(tokenizer) -> Ends:
    end = tokenizer.eos_token_id
    return Ends(stop_ids=[end], text=end, turn=end)


def rollout(ids: Sequence[int], logps: Sequence[float] | None = None) -> Rollout:
    prompt = np.array([3], np.int32)
    return Rollout(
        prompt=Prompt(uid="0", token_ids=prompt, teacher_ids=prompt),
        token_ids=np.array(ids, np.int32),
        logps=np.array(logps or np.zeros(len(ids)), np.float32),
        finish_reason=FinishReason.stop,
        version=0,
    )


def written_ids(kind: str, rng: random.Random) -> list[int]:
    """A completion: a text in the student's tokens, or tokens drawn at random, as a student may write."""
    own = tokenizer(kind)
    if rng.random() < 0.7:
        return own(random_text(rng), add_special_tokens=False)["input_ids"]
    first = max(own.all_special_ids) + 1
    return [rng.randrange(first, len(own)) for _ in range(rng.randrange(1, 12))]


def brute_force(student: Sequence[int | None], teacher: Sequence[int | None]) -> list[Span]:
    """Every pair of positions is tried; a token of no text goes with the one in front of it."""
    spans, at = [], (0, 0)
    for i in range(1, len(student) + 1):
        for j in range(1, len(teacher) + 1):
            same = bool(student[i - 1]) and student[i - 1] == teacher[j - 1]
            is_last_of_student = i == len(student) or student[i] != student[i - 1]
            is_last_of_teacher = j == len(teacher) or teacher[j] != teacher[j - 1]
            if same and is_last_of_student and is_last_of_teacher:
                spans.append(Span(at[0], i, at[1], j))
                at = (i, j)
    if at[0] < len(student):
        spans.append(Span(at[0], len(student), at[1], len(teacher)))
    elif at[1] < len(teacher):
        last = spans.pop()
        spans.append(Span(last.student_start, at[0], last.teacher_start, len(teacher)))
    return spans


def test_ten_thousand_random_strings_are_covered_once_in_order_by_the_least_spans() -> None:
    rng = random.Random(0)
    kinds = [(a, b) for a in KINDS for b in KINDS]
    counts: Counter[str] = Counter()
    for number in range(STRINGS):
        student, teacher = kinds[number % len(kinds)]
        pair, end = pair_of(student, teacher), tokenizer(student).eos_token_id
        ids = written_ids(student, rng)
        ended = not ids or rng.random() < 0.7
        text = written_text([pair.student(i) for i in ids], is_cut=not ended)
        teacher_ids, teacher_ends = pair.encode(text.text)
        found_ids, spans = pair.align(rollout([*ids, end] if ended else ids))

        if ended:
            last = spans.pop()
            assert last == Span(len(ids), len(ids) + 1, len(teacher_ids), len(teacher_ids) + 1)
            assert found_ids.pop() == tokenizer(teacher).eos_token_id
        assert found_ids == teacher_ids
        assert spans == brute_force(text.ends, teacher_ends), (student, teacher, text.text)
        # every token of both sides is in one span, in order
        assert [i for s in spans for i in range(s.student_start, s.student_end)] == [
            *range(len(ids))
        ]
        assert [j for s in spans for j in range(s.teacher_start, s.teacher_end)] == [
            *range(len(teacher_ids))
        ]
        # so is every byte of the text: both sides of a span end at the same one
        edges = [0]
        for span in spans[:-1]:
            assert text.ends[span.student_end - 1] == teacher_ends[span.teacher_end - 1]
            edges.append(text.ends[span.student_end - 1])
        size = len(text.text.encode())
        assert all(a < b for a, b in pairwise([*edges, max(size, edges[-1] + 1)]))
        if text.ends and teacher_ends:
            assert teacher_ends[-1] == size
            assert text.ends[-1] == size or not ended
        counts["single"] += sum(s.student_tokens == s.teacher_tokens == 1 for s in spans)
        counts["many"] += sum(s.student_tokens > 1 and s.teacher_tokens > 1 for s in spans)
        counts["inside a character"] += None in text.ends or None in teacher_ends
    assert counts["single"] > STRINGS
    assert counts["many"] > STRINGS / 10
    assert counts["inside a character"] > STRINGS / 20


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_unsplit", "byte_fallback"])
def test_the_tokens_of_a_kind_that_loses_nothing_are_the_text(kind: str) -> None:
    rng, pair = random.Random(1), pair_of(kind, kind)
    for _ in range(500):
        string = random_text(rng).replace("\u2581", "")  # SentencePiece's mark is a space to it
        ids, text_ends = pair.encode(string)
        assert b"".join(pair.teacher(i) for i in ids) == string.encode()
        assert text_ends[-1:] in ([len(string.encode())], [])


def test_pieces_of_a_character_are_joined_and_what_is_no_character_is_marked() -> None:
    pieces = ["\u00e9".encode()[:1], "\u00e9".encode()[1:], b"a", b"\xff", b"b"]
    whole = written_text(pieces, is_cut=False)
    assert (whole.text, whole.ends) == ("\u00e9a\ufffdb", [1, 2, 3, 6, 7])
    halves = written_text([b"\xff\xfe", b"\xc3"], is_cut=False)
    assert (halves.text, halves.ends) == ("\ufffd\ufffd\ufffd", [6, 9])
    inside = written_text(
        ["\U0001f600".encode()[:1], "\U0001f600".encode()[1:3], b"a"], is_cut=False
    )
    assert (inside.text, inside.ends) == ("\ufffda", [None, 3, 4]), (
        "one mark for what belongs together"
    )
    cut = written_text([b"a", "\U0001f600".encode()[:2]], is_cut=True)
    assert cut.text == "a", "a character that is not finished is left out"
    assert cut.ends == [1, None]
    ended = written_text([b"a", "\U0001f600".encode()[:2]], is_cut=False)
    assert ended.text == "a\ufffd"


def test_two_byte_level_tokenizers_meet_inside_a_character() -> None:
    few, many = byte_level(0), byte_level(200)
    reads = [TokenBytes(each) for each in (few, many)]
    string = "a\U0001f600b"
    sides = [
        written_text([read(i) for i in each(string)["input_ids"]], is_cut=False).ends
        for read, each in zip(reads, (few, many), strict=True)
    ]
    assert sides[0] == [1, 2, 3, 4, 5, 6]
    assert len(align(*sides)) == len(sides[1]), "each of the larger tokens is one span"


def test_the_teachers_sum_over_a_span_is_shared_so_that_its_tokens_have_one_advantage() -> None:
    spans = [Span(0, 2, 0, 1), Span(2, 3, 1, 4), Span(3, 5, 4, 6), Span(5, 6, 6, 6)]
    teacher = np.array([-3.0, -0.5, -0.25, -1.0, -2.0, -0.125], np.float32)
    engine = np.array([-1.0, -0.5, -0.1, -4.0, -0.2, -0.7], np.float32)
    logps = shared_logps(spans, teacher, engine)
    assert logps.sum() == pytest.approx(teacher.sum() + engine[5])
    assert logps[:2].sum() == pytest.approx(-3.0)
    assert logps[2] == np.float32(-1.75)
    gain = logps - engine
    assert gain[0] == pytest.approx(gain[1])
    assert gain[3] == pytest.approx(gain[4])
    assert gain[5] == 0.0, "nothing is known of it"
    nobody = np.full(6, np.nan, np.float32)
    assert shared_logps(spans, teacher, nobody).tolist() == pytest.approx(
        [-1.5, -1.5, -1.75, -1.0625, -1.0625, 0.0]
    )


def test_one_tokenizer_on_both_sides_aligns_every_token_with_itself() -> None:
    rng, pair = random.Random(2), pair_of("byte_level", "byte_level")
    for _ in range(300):
        ids = tokenizer("byte_level")(random_text(rng))["input_ids"]
        found, spans = pair.align(rollout([*ids, tokenizer("byte_level").eos_token_id]))
        assert found == [*ids, tokenizer("byte_level").eos_token_id]
        assert spans == [Span(t, t + 1, t, t + 1) for t in range(len(found))]


def test_the_common_vocabulary_has_equal_texts_and_the_ends() -> None:
    pair = pair_of("byte_fallback", "byte_level")
    own, other = tokenizer("byte_fallback"), tokenizer("byte_level")
    common = pair.common(len(own), len(other))
    pairs = dict(zip(common.student_ids.tolist(), common.teacher_ids.tolist(), strict=True))
    assert len(pairs) == len(set(pairs.values())) > 50
    assert pairs[own.eos_token_id] == other.eos_token_id
    for mine, its in pairs.items():
        assert pair.student(mine) == pair.teacher(its)
    marks = {
        str(own.convert_ids_to_tokens(m))[0]: other.convert_ids_to_tokens(t)
        for m, t in pairs.items()
    }
    assert marks["\u2581"][0] == "\u0120", "a space is a space"
    assert max(pair.common(40, len(other)).student_ids) < 40
