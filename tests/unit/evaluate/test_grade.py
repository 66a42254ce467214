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
    ("contains", "314", "3.14", False),
    ("contains", "it is 3.14.", "3.14", True),
    ("contains", "15", "1,5", False),
    ("contains", "v12.3", "v1.23", False),
    ("contains", "1,000 of them", "1000", True),
    ("contains", "12345", "12,345", True),
    ("contains", "-5", "5", False),
    ("contains", "5", "-5", False),
    ("contains", "it is \u20135.", "-5", True),
    ("contains", "-$5", "-5", True),
    ("contains", "3-5 of them", "5", True),
    ("contains", "(2)-5", "5", True),
    ("contains", "2020\u20132021", "2021", True),
    ("contains", ".5", "5", False),
    ("contains", "so +5", "5", True),
    ("contains", "Paris,France", "paris", True),
    ("contains", "it is <", "<", True),
    ("contains", "it is >", "<", False),
    ("contains", "a || b", "||", True),
    ("contains", "x < 3", "x > 3", False),
    ("contains", "**x>3**", "x > 3", True),
    ("contains", "1, 2", "1/2", False),
    ("contains", "in C++.", "C++", True),
    ("contains", "in C", "C++", False),
    ("contains", "in C++ or C#", "C", False),
    ("contains", "Question #5", "5", True),
    ("contains", "\u7b54\u6848\u662f\u5317\u4eac\u3002", "\u5317\u4eac", True),
    ("contains", "\u7b54\u6848\u662f\u5357\u4eac\u3002", "\u5317\u4eac", False),
    ("contains", "\u6771\u4eac\u90fd\u3067\u3059", "\u6771\u4eac", True),
    ("contains", "\u4e00\u5171\u662f15\u4e2a", "5", False),
    ("contains", "\u4e00\u5171\u662f15\u4e2a", "15", True),
    (
        "contains",
        "\u0e04\u0e37\u0e2d\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
        "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
        True,
    ),
    ("number", "so 1,042 apples", "1042.0", True),
    ("number", "it costs $-5.50.", "-5.5", True),
    ("number", "8-3 = 5, hence 5-3", "3", True),
    ("number", "first 7, then 8", "7", False),
    ("number", "x = \u22122", "-2", True),
    ("number", "0.5", ".5", True),
    ("number", "none", "5", False),
    ("number", "-.5", "-0.5", True),
    ("number", "-.5", ".5", False),
    ("number", "0.5", "-.5", False),
    ("number", "$-.5", "-0.5", True),
    ("number", "it is 1e-7", "0.0000001", True),
    ("number", "it is 1e-7", "7", False),
    ("number", "1.5e3", "1500", True),
    ("number", "1.5E+03", "1500", True),
    ("number", "1e\u22127", "1e-7", True),
    ("number", "5em", "5", True),
    ("number", "\u20135", "-5", True),
    ("number", "10\u20135", "5", True),
    ("number", "1{,}000", "1000", True),
    ("number", "1{,}234{,}567.5", "1234567.5", True),
    ("number", "5\\,000", "5000", True),
    ("number", "5", "5 (that is, 5.0)", True),
    ("math", r"Thus $\boxed{\frac{2}{4}}$", r"\frac{1}{2}", True),
    ("math", "the answer is 0.5", "1/2", True),
    ("math", r"$x^2+2x+1$", r"$(x+1)^2$", True),
    ("math", r"\boxed{3}", "4", False),
    ("math", "", "4", False),
    ("math", "50%", "50%", True),
    ("math", r"\boxed{50\%}", "50%", True),
    ("math", r"\boxed{50%}", "50%", True),
    ("math", "The answer is 50%.", r"50\%", True),
    ("math", r"\boxed{5\%}", "50%", False),
    ("math", "It is 60%.", "50%", False),
    ("math", "It is 50%.", "1/2", True),
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


ANSWERS = [
    *("5", "-5", "\u20135", ".5", "-.5", "-$5", "+5", "5.", "1,000", "1{,}000", "3.14", "-1,234.5"),
    *("1e-7", "1.5e3", "50%", "12.5 %", "No.5", "1/2", "3/4", "12:30 to 13:45", "1,00,000", "5,6"),
    *("U.S.", "C++", "C#", "<", "+", "x <= 3", "a & b", "__init__", "_", "---", "|", "||", "a|b"),
    *(
        "\u5317\u4eac",
        "\u0e01\u0e23\u0e38\u0e07",
        "\u00e9",
        "e\u0301",
        "\U0001f600",
        "O'Neil",
        "1990's",
        "v1.2.3",
    ),
    *(
        "{",
        "$",
        r"\frac{1",
        r"\boxed{5}",
        "5\n6",
        "[1, 2)",
        "['a', 'b']",
        "10:30 pm",
        "yes",
        "$5 and $6",
    ),
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", ["exact", "after", "contains", "math"])
def test_every_grader_finds_the_answer_itself_right(name, answer):
    grade = grader(name, marker="####")
    completion = f"####{answer}" if name == "after" else answer
    assert grade(completion, answer)
    assert grade(completion, ("something else", answer))


@pytest.mark.parametrize("answer", ANSWERS[: ANSWERS.index("1/2")])
def test_number_finds_the_answer_itself_right(answer):
    assert grader("number")(answer, answer)
    assert grader("number")(answer, ("something else", answer))


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


@pytest.mark.parametrize(
    "answer", ["1/2", "3/4", "12:30 to 13:45", "5 m^2", r"\frac{1}{2}", ("1", "1/2"), "2+2=4"]
)
def test_an_answer_of_several_numbers_is_refused_by_number(answer):
    with pytest.raises(ValueError, match=r"numbers; the grader number compares one: use math"):
        grader("number")("2", answer)
