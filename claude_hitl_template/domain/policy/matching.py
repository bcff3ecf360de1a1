"""Matches the words of a command with the program and operands of a Bash rule."""

import contextlib
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from claude_hitl_template.domain.policy import programs
from claude_hitl_template.domain.policy.shell import GLOB, MANY, ONE, UNKNOWN

ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(\[[^]]*\])?\+?=")


@dataclass(frozen=True)
class Wanted:
    """The program of a rule, its operands in their order, and its options, which may stand anywhere."""

    program: str
    operands: tuple[str, ...]
    options: tuple[str, ...]

    @classmethod
    def of(cls, words: Sequence[str]) -> "Wanted":
        rest = tuple(words[1:])
        options = tuple(word for word in rest if word.startswith("-") and word != "-")
        return cls(_name(words[0]), tuple(word for word in rest if word not in options), options)


@lru_cache(maxsize=1024)
def wanted(pattern: str) -> tuple[Wanted, ...]:
    """The readings of a rule's text: quoted as a shell reads it, and without its quotes."""
    texts = [re.sub(r"""["'\\]""", "", pattern).split()]
    with contextlib.suppress(ValueError):  # unbalanced quotes
        texts.append(shlex.split(pattern))
    return tuple(dict.fromkeys(Wanted.of(words) for text in texts if (words := _without_assignments(text))))


def _without_assignments(words: list[str]) -> list[str]:
    start = next((i for i, word in enumerate(words) if not ASSIGNMENT.match(word)), len(words))
    return words[start:] or words


def _name(word: str) -> str:
    """A program's name as file systems compare it; those of macOS take `GIT` for git."""
    return unicodedata.normalize("NFKC", word.rsplit("/", 1)[-1]).casefold().lstrip("=")


def known_name(word: str) -> str | None:
    """The program's name, None if it is known only when it runs."""
    tail = word.rsplit("/", 1)[-1]
    if UNKNOWN & set(tail) or MANY in word or not tail:
        return None
    return _name(tail)


@dataclass(frozen=True, slots=True)
class Invocation:
    """Words of which one from `first` to `last` may be the program."""

    words: Sequence[str]
    first: int
    last: int
    span: tuple[int, int]


def may_be(call: Invocation, rule: Wanted) -> bool:
    """Follows every reading at once: how many of the rule's operands were met since which first word."""
    words = call.words
    states: dict[tuple[int, int], int] = {}
    values = programs.VALUES.get(rule.program, frozenset[str]())
    latest = _Options(words, rule) if rule.options else None
    for i, word in enumerate(words):
        following: dict[tuple[int, int], int] = {}
        for (met, pending), start in states.items():
            for state in _steps(word, met, pending, rule, values):
                following[state] = min(start, following.get(state, start))
        if call.first <= i <= call.last:
            for met in _begins(word, rule):
                following.setdefault((met, 0), i)
        states = following
        done = [start for (met, _), start in states.items() if met >= len(rule.operands)]
        if done and (latest is None or latest.follow(min(done))):
            return True
        if not states and i >= call.last:
            return False
    return False


def _begins(word: str, rule: Wanted) -> Iterator[int]:
    """Yields how many operands of the rule are matched if this word is the program."""
    name = known_name(word)
    if name == rule.program:
        yield 0
    elif name is None:
        if MANY in word:
            yield len(rule.operands)
        elif _may_be_program(word, rule.program):
            yield len(rule.operands) if GLOB in word else 0
    elif name.startswith(f"{rule.program}-"):  # git-push
        joined = rule.program
        for met, operand in enumerate(rule.operands, 1):
            joined += f"-{operand}"
            if joined == name:
                yield met


def _may_be_program(word: str, program: str) -> bool:
    tail = re.split(f"[{ONE}{GLOB}]", word)[-1]
    return program.endswith(tail.casefold())


_FREE, _PERHAPS, _VALUE = 0, 1, 2  # what the next word is to an option before it


def _steps(
    word: str, met: int, pending: int, rule: Wanted, values: frozenset[str]
) -> Iterator[tuple[int, int]]:
    """The states after one more word."""
    operands = rule.operands
    if met >= len(operands):
        yield met, _FREE  # only options are still to come
        return
    if MANY in word:
        if pending or _may_begin(word, operands[met]) or word[0] in "-+":
            yield len(operands), _FREE
        return
    if pending == _VALUE:
        yield met, _FREE
        return
    if word[:1] in ("-", "+", ONE):
        yield met, _FREE if "=" in word else _VALUE if word in values else _PERHAPS
    elif pending or ASSIGNMENT.match(word):
        yield met, _FREE
    if _may_begin(word, operands[met]):
        yield (len(operands) if GLOB in word else met + 1), _FREE


def _may_begin(word: str, operand: str) -> bool:
    """Whether the word may begin with the rule's operand, as far as the word is known."""
    if not UNKNOWN & set(word):
        return word.startswith(operand)
    known = re.split(f"[{ONE}{MANY}{GLOB}]", word, maxsplit=1)[0]
    return known.startswith(operand) or operand.startswith(known)


class _Options:
    """The last positions of a rule's options among some words."""

    def __init__(self, words: Sequence[str], rule: Wanted) -> None:
        self.last = min(_last(words, part) for option in rule.options for part in _parts(option))

    def follow(self, start: int) -> bool:
        return self.last > start


def _parts(option: str) -> list[str]:
    """`-rf` may be given as `-r` and `-f`."""
    return [f"-{letter}" for letter in option[1:]] if re.fullmatch(r"-[A-Za-z]+", option) else [option]


def _last(words: Sequence[str], option: str) -> int:
    return next((i for i in range(len(words) - 1, -1, -1) if _is_option(words[i], option)), -1)


def _is_option(word: str, option: str) -> bool:
    """Whether the word may be this option: itself, among others (`-fr`), cut short, or in its long or short form.

    Long and short forms of an option mostly share their first letter.
    """
    if MANY in word or word[:1] in (ONE, GLOB) or word.startswith(option):
        return True
    if not word.startswith("-") or len(word) < 2:
        return False
    name = word.partition("=")[0]
    if option.startswith("--"):
        return (
            option.startswith(name)
            if name.startswith("--") and len(name) > 3
            else option[2:3] in _letters(word)
        )
    return len(option) == 2 and option[1] in _letters(word)


def _letters(word: str) -> str:
    return word[2:3] if word.startswith("--") else word[1:]


def mentions(words: Sequence[str], rule: Wanted) -> bool:
    """Whether the rule's words stand among these in their order, whatever stands between them."""
    start = next((i for i, word in enumerate(words) if known_name(word) == rule.program), None)
    if start is None:
        return False
    rest = iter(words[start + 1 :])
    if not all(any(_is_mentioned(word, operand) for word in rest) for operand in rule.operands):
        return False
    return not rule.options or _Options(words, rule).follow(start)


def _is_mentioned(word: str, operand: str) -> bool:
    return word.startswith(operand) or "$" in word or _may_begin(word, operand)
