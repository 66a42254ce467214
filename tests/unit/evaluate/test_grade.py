"""Graders: what counts as right."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from opd.evaluate.grade import grader

CASES = [
    ("exact", " Paris\n", "Paris", True),
    ("exact", "Paris.", "Paris", False),
    ("after", "3+4=7#1#7", "7", True),
    ("after", "7", "7", False),
    ("after", "#7 ", " 7", True),
    ("contains", "It is **Paris**, of course.", "paris", True),
    ("contains", "the U.S. of A", "US", True),
    ("contains", "comparison", "Paris", False),
    ("contains", "pi is 3.14", "3", False),
    ("contains", "New York City", "London|new york", True),
    ("contains", "anything", "|", False),
    ("number", "so 1,042 apples", "1042.0", True),
    ("number", "it costs $-5.50.", "-5.5", True),
    ("number", "8-3 = 5, hence 5-3", "3", True),
    ("number", "first 7, then 8", "7", False),
    ("number", "x = \u22122", "-2", True),
    ("number", "0.5", ".5", True),
    ("number", "none", "5", False),
    ("math", r"Thus $\boxed{\frac{2}{4}}$", r"\frac{1}{2}", True),
    ("math", "the answer is 0.5", "1/2", True),
    ("math", r"$x^2+2x+1$", r"$(x+1)^2$", True),
    ("math", r"\boxed{3}", "4", False),
    ("math", "", "4", False),
]


ALTERNATIVES = [
    ("exact", "Lutetia", ("Paris", "Lutetia"), True),
    ("exact", "Paris|Lutetia", ("Paris", "Lutetia"), False),
    ("exact", "Rome", ("Paris", "Lutetia"), False),
    ("after", "it is #8", ("7", "8"), True),
    ("after", "it is #7|8", ("7", "8"), False),
    ("contains", "In New York.", ("London", "new york"), True),
    ("contains", "In York.", ("London", "new york"), False),
    ("contains", "a", ("a|b",), False),
    ("contains", "a b", ("a|b",), True),
    ("number", "it is 8", ("7", "8.0"), True),
    ("number", "it is 8", ("eight", "8"), True),
    ("number", "it is 9", ("eight", "8"), False),
    ("number", "nothing", ("eight", "8"), False),
    ("math", r"$\frac{1}{2}$", ("2", "0.5"), True),
    ("math", r"$\frac{1}{3}$", ("2", "0.5"), False),
]


@pytest.mark.parametrize(("name", "completion", "answer", "right"), ALTERNATIVES)
def test_every_alternative_is_right(name, completion, answer, right):
    assert grader(name)(completion, answer) is right


@pytest.mark.parametrize(("name", "completion", "answer", "right"), CASES)
def test_the_grader_says(name, completion, answer, right):
    assert grader(name)(completion, answer) is right


def test_another_marker_is_possible():
    assert grader("after", "Answer:")("Answer: 1 Answer: 2", "2")


def test_math_is_safe_in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(grader("math"), r"\boxed{4}", "2+2").result()


def test_an_unknown_grader_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="found grader 'fuzzy'; allowed: exact, after"):
        grader("fuzzy")
    with pytest.raises(ValueError, match="empty marker"):
        grader("after", "")


def test_an_answer_without_a_number_is_refused_by_number():
    with pytest.raises(ValueError, match="without a number"):
        grader("number")("5", "five")
    with pytest.raises(ValueError, match=r"the answer 'five \| six' without a number"):
        grader("number")("5", ("five", "six"))
