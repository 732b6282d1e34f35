"""math-verify on honest answers, and on answers that are after the machine it runs on."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("math_verify", reason="the math extra comes with requirements/test.txt")

from omegaconf import OmegaConf

from nemo_apo.grading.math_answers import _is_foreign, check_answer, math_grader
from nemo_apo.grading.outcome import Grade, Refused, attempt

from .workers import LONG, pool, text

CANARY = "canary_of_the_maths"
SYSTEM = f"__import__('os').system('touch {CANARY}')"
SUM = r"\sum_{n=0}^{\infty} \frac{%s^{n}}{n!}"
# Answers that are after code, and the reasons that they may be counted by; 0 is a wrong answer.
HOSTILE = {
    "import": SYSTEM,
    "text": rf"\text{{{SYSTEM}}}",
    "operator": rf"\operatorname{{eval}}({SYSTEM})",
    "variable": rf"\variable{{{SYSTEM}}}",
    "dunder chain": r"().__class__.__bases__[0].__subclasses__()",
    "escaped dunder": r"\_\_import\_\_(os)",
    "spaced dunder": r"_ _import_ _(os)",
    "open": f"open({CANARY}, w)",
    "print in a sum": SUM % "x_{print(7)}",
    "open in a sum": SUM % f"x_{{open({CANARY})}}",
    "call in a sum": SUM % "f(1)",
    "variable in a sum": SUM % r"\variable{abc}",
    "exit in a sum": SUM % r"\mathrm{exit}",
    "infinite sum": SUM % "1",
    "input": r"\input{/etc/passwd}",
    "a million braces": "{" * 10**6,
    "nested groups": "{" * 1000 + "1" + "}" * 1000,
    "nested fractions": r"\frac{1}{" * 200 + "1" + "}" * 200,
    "power tower": "9^{9^{9^{9}}}",
    "flat tower": "9^9^9^9",
    "huge output": "1" * 10**6,
    "backslashes": "\\" * 10**5,
    "null": "1\x002",
    "surrogate": "\ud800",
}
# Honest to the parser, but more than any machine can compute.
ENDLESS = ("9^{9^{9}}", "((99!)!)!", r"10^{10^{10}}")


def boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


@pytest.fixture(scope="module")
def grader() -> Callable[[str, str, str], float]:
    return math_grader()


@pytest.mark.parametrize(
    ("completion", "reference", "grade"),
    [
        (r"\boxed{\frac12}", "0.5", 1.0),
        ("<answer>1/2</answer>", r"\frac{1}{2}", 1.0),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        (r"\boxed{x=5}", "5", 1.0),
        (r"\boxed{\text{Monday}}", r"\text{Monday}", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{x^{2^{n}}}", "x^{2^n}", 1.0),
        (
            r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            1,
        ),
        (r"\boxed{\gcd(4,6)}", "2", 1.0),
        (r"\boxed{3}", "4", 0.0),
        (r"\boxed{1} \boxed{2}", "1", 0.0),
        ("2", "2", 0.0),
        ("", "2", 0.0),
    ],
)
def test_answers(
    completion: str, reference: str, grade: float, grader: Callable[[str, str, str], float]
) -> None:
    assert grader("", completion, reference) == grade


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_refused_or_wrong_and_nothing_happens(
    name: str,
    grader: Callable[[str, str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a thread that is not the main one, where no alarm could end it."""
    monkeypatch.chdir(tmp_path)
    grades: list[Grade] = []
    completion = boxed(HOSTILE[name])
    threads = [
        threading.Thread(target=lambda: grades.append(attempt(lambda: grader("", completion, "1"))))
        for _ in range(20 if LONG else 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grades) == len(threads)
    assert all(grade.reason == "refused" or grade.value == 0.0 for grade in grades)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(reason="imports SymPy into a worker two or more times")
def test_what_an_endless_answer_costs_is_bounded_and_the_rest_is_graded() -> None:
    endless = ENDLESS if LONG else ENDLESS[:1]
    samples = [text(boxed(answer), "4") for answer in endless] + [text(boxed("4"), "4")]
    with pool(grader="math_verify", wall_s=2.0, cpu_s=2, memory_mib=1024) as workers:
        grades = workers.grade(samples)
    assert {grade.reason for grade in grades[:-1]} <= {"cpu", "timeout", "memory"}
    assert grades[-1].value == 1.0


@pytest.mark.parametrize("name", ["print in a sum", "infinite sum"])
def test_source_made_from_an_answer_is_stopped_at_the_compiler(
    name: str, grader: Callable[[str, str, str], float]
) -> None:
    check_answer(HOSTILE[name])  # nothing in the text itself gives it away
    with pytest.raises(Refused, match="run as code"):
        grader("", boxed(HOSTILE[name]), "2")


def test_only_arithmetic_of_monomials_may_be_made() -> None:
    """The function that SymPy makes, and what would be something else in its clothes."""
    source = "def monomial_div(A, B):\n    (a0,) = A\n    (b0,) = B\n    r0 = a0 - b0\n"
    source += "    if r0 < 0: return None\n    return (r0,)\n"
    assert not _is_foreign(source.encode(), "<string>")
    for harmless, harmful in (
        ("A\n", "open('x')\n"),
        ("A\n", "x\n"),
        ("(A, B)", "(A, B=print())"),
        ("return (r0,)", "return r0(A)"),
        ("monomial_div", "monomial_eval"),
        ("    return (r0,)\n", "    return (r0,)\nprint(1)\n"),
        ("r0 = a0", "r0 = a0.__class__"),
    ):
        assert harmless in source
        assert _is_foreign(source.replace(harmless, harmful, 1).encode(), "<string>")


def test_code_outside_a_comparison_is_not_touched(
    grader: Callable[[str, str, str], float],
) -> None:
    grader("", boxed("1"), "1")
    assert eval("1 + 1") == 2


def test_a_hostile_reference_is_refused_too(grader: Callable[[str, str, str], float]) -> None:
    with pytest.raises(Refused):
        grader("", boxed("1"), SYSTEM)


@pytest.mark.parametrize(
    "answer",
    [
        "x^{2^{n}}",
        "x^2+y^2+z^2",
        "a_{b_c}",
        r"\{x \mid x > 2\}",
        "f'(x)",
        r"\left(\frac{1}{2}, -\infty\right]",
        "1" * 2000,
    ],
)
def test_honest_answers_pass_the_rule(answer: str) -> None:
    check_answer(answer)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("1" * 2001, "longer than 2000"),
        ("{" * 33 + "}" * 33, "deeper than 32"),
        ("([{" * 11 + "}])" * 11, "deeper than 32"),
        ("x^{2^{2^2}}", "stacked powers"),
        ("9^9^9^9", "stacked powers"),
        ("a__b", "code"),
        (r"a\_ \_b", "code"),
        ("x_{_b}", "code"),
        ("'a\"'", "code"),
        (r"\operatorname{f}(x)", "code"),
    ],
)
def test_the_rule_by_its_parts(answer: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        check_answer(answer)


def test_omegaconf_still_reads_its_grammar() -> None:
    """Both are parsers made by ANTLR, whose runtimes do not read each other's tables."""
    config = OmegaConf.create({"a": 2, "b": "${a}", "c": "x${oc.env:HOME}"})
    assert config.b == 2
    assert config.c.startswith("x/")
