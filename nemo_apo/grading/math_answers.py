"""Mathematical answers compared by math-verify, which hands them to SymPy.

A model's answer can reach ``eval`` there. The digits of every number go through ``parse_expr``,
as does all of what math-verify's plain-text extraction finds (not used here: answers are read as
LaTeX only), and SymPy evaluates an infinite sum by ``lambdify``, which compiles Python source that
names the answer's symbols. Hence three barriers: answers that no person would write are refused;
while an answer is being compared, compiling source is refused unless it is a number or SymPy's own
arithmetic of monomials; and the process can be killed and may write nothing.
"""

import contextlib
import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator

from nemo_apo.grading.answers import marked_answer
from nemo_apo.grading.outcome import Refused
from nemo_apo.grading.writing import alternatives, plain, same_words

LONGEST_ANSWER = 2000
DEEPEST_NESTING = 32
# An exponent of an exponent is common in answers, the next one is a number that fits nowhere.
MOST_STACKED_POWERS = 2
# What names or calls something in Python but has no place in an answer.
_CODE = re.compile(
    r"_[\s\\{}]*_|[\"`@#?]|\\(?:operatorname|variable|input|include|write|def|let|catcode)(?![a-z])"
)
# How SymPy evaluates the digits of a number, after a fixed import.
_NUMBER_SOURCE = re.compile(r"from sympy import \*|(?:Integer|Float) \('?[\d.eE+-]+'? \)", re.ASCII)
# How SymPy makes the arithmetic of monomials for a number of variables; no name is the answer's.
_MONOMIAL_SOURCE = re.compile(
    r"def monomial_(?:mul|pow|mulpow|ldiv|div|lcm|gcd)\((?:A, B|A, k|A, B, k)\):\n"
    r"(?:    (?:(?:return|if|else|None|A|B|k|[abr]\d+|0)(?![\w(])|[ (),*<>=+:-])+\n)+",
    re.ASCII,
)
_EVENTS = frozenset(
    {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.__new__"}
)
_comparing = threading.local()


def check_answer(answer: str) -> None:
    """Raise ``Refused`` for an answer that must not be given to SymPy."""
    if len(answer) > LONGEST_ANSWER:
        raise Refused(f"longer than {LONGEST_ANSWER} characters")
    if _CODE.search(answer):
        raise Refused("holds what looks like code")
    if _depth(answer, "{([", "})]") > DEEPEST_NESTING:
        raise Refused(f"nested deeper than {DEEPEST_NESTING}")
    if _stacked_powers(answer) > MOST_STACKED_POWERS:
        raise Refused(f"more than {MOST_STACKED_POWERS} stacked powers")


def math_grader() -> Callable[[str, str, str], float]:
    """A grader that gives 1 for a marked answer that equals the reference, mathematically.

    Works in any thread: the time limits of math-verify, which need the main thread, are off, so
    the caller must have its own.

    Raises:
        ImportError: if math-verify is not installed (the ``math`` extra).
    """
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ModuleNotFoundError as missing:
        raise ImportError(f"{missing}: pip install 'nemo_apo[math]'") from None

    sys.addaudithook(_refuse_code)
    targets = (LatexExtractionConfig(boxed_match_priority=0),)

    @functools.lru_cache(maxsize=1024)
    def parsed(latex: str) -> list:
        return parse(f"\\boxed{{{latex}}}", targets, parsing_timeout=None)

    def compare(reference: str, answer: str) -> bool:
        return verify(parsed(reference), parsed(answer), timeout_seconds=None)

    def grade(prompt: str, completion: str, reference: str) -> float:
        answer = marked_answer(completion)
        if answer is None:
            return 0.0
        check_answer(reference)
        check_answer(answer)
        reference, answer = plain(reference), plain(answer)
        if same_words(reference, answer):
            return 1.0
        with _no_code():
            pairs = [(reference, answer), *alternatives(reference, answer)]
            return float(any(compare(*pair) for pair in pairs))

    # What SymPy imports when it first simplifies takes longer than all that follows.
    compare("(x+1)^2", "x^2+2x")
    return grade


@contextlib.contextmanager
def _no_code() -> Iterator[None]:
    """Refuse to compile or execute source, and to start a process, in this thread."""
    _comparing.now = True
    try:
        yield
    finally:
        _comparing.now = False


def _refuse_code(event: str, arguments: tuple) -> None:
    """An audit hook, which cannot be removed again; it acts inside ``_no_code`` only."""
    if not getattr(_comparing, "now", False):
        return
    foreign = event == "compile" and _is_foreign(*arguments) and not _importing()
    if foreign or event in _EVENTS:
        raise Refused("was about to be run as code")


def _is_foreign(source: object, filename: object) -> bool:
    """Whether source comes from a string (a module's comes from a file) and is not SymPy's own."""
    text = source.decode() if isinstance(source, bytes) else str(source)
    known = _NUMBER_SOURCE.fullmatch(text) or _MONOMIAL_SOURCE.fullmatch(text)
    return str(filename).startswith("<") and not known


def _importing() -> bool:
    """Whether a module is being imported, whose own source this then is."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _depth(text: str, opening: str, closing: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in opening) - (character in closing)
        deepest = max(deepest, depth)
    return deepest


def _stacked_powers(text: str) -> int:
    """Most carets that stand in each other's braces, or follow each other directly."""
    open_powers: list[bool] = []
    most = bare = 0
    for at, character in enumerate(text):
        if character == "{":
            open_powers.append(text[:at].rstrip().endswith("^"))
        elif character == "}" and open_powers:
            open_powers.pop()
        elif character == "^":
            bare = bare + 1 if at >= 2 and text[at - 2] == "^" else 1
            most = max(most, sum(open_powers) + bare)
    return most
