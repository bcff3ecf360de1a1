"""Ask and deny rules for Bash: whether a command may run the program that a rule names.

A rule matches unless it is certain that nothing in the command runs what it names. What cannot be read, and every
word that is known only when the command runs, counts as a match wherever it may be, or hide, the program.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from claude_hitl_template.domain.policy import programs
from claude_hitl_template.domain.policy.matching import (
    Invocation,
    Wanted,
    known_name,
    may_be,
    mentions,
    wanted,
)
from claude_hitl_template.domain.policy.shell import (
    GLOB,
    LARGEST,
    MANY,
    ONE,
    UNKNOWN,
    NotUnderstood,
    Run,
    read,
)

_KEYWORDS = frozenset({"if", "then", "else", "elif", "while", "until", "do", "!", "{", "function", "-"})
_DEEPEST = 8
_CACHED = 8 * 1024


@dataclass(frozen=True, slots=True)
class Segment:
    """One simple command of a command line, with its place in the text (in characters)."""

    text: str
    start: int
    end: int


# -- what a command may run


@dataclass(frozen=True, slots=True)
class _Text:
    """Words of a text that may contain a command in another language (`os.system("git push")`)."""

    words: tuple[str, ...]
    span: tuple[int, int]


@dataclass(slots=True)
class Analysis:
    """Everything that a command may run. `anything`: places where that is unknown; `spans`: its simple commands."""

    whole: tuple[int, int]

    invocations: list[Invocation] = field(default_factory=list["Invocation"])
    texts: list[_Text] = field(default_factory=list["_Text"])
    anything: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    spans: dict[tuple[int, int], None] = field(default_factory=dict[tuple[int, int], None])

    def matches(self, rule: Wanted) -> bool:
        return bool(self.anything) or any(True for _ in self.found(rule))

    def found(self, rule: Wanted) -> Iterator[tuple[int, int]]:
        """The places (bytes) that may run what the rule names."""
        yield from self.anything
        yield from (text.span for text in self.texts if mentions(text.words, rule))
        yield from (call.span for call in self.invocations if may_be(call, rule))


def may_run(command: str, pattern: str) -> bool:
    """Whether the command may run the program that a rule's text names.

    Never raises. A command of more than 16 KiB, or one that is not understood, may run anything.
    """
    analysis = analyse(command)
    return any(analysis.matches(rule) for rule in wanted(pattern))


def segments(command: str, pattern: str | None = None) -> list[Segment]:
    """The simple commands of a command line in their order; with a pattern only those that may run what it names.

    The whole line is one segment if it is not understood.
    """
    analysis = analyse(command)
    spans = list(analysis.spans) or [analysis.whole]
    if pattern is not None:
        spans = [span for rule in wanted(pattern) for span in analysis.found(rule)]
    source = command.encode(errors="surrogatepass")
    return [_segment(source, start, end) for start, end in sorted(set(spans))]


def _segment(source: bytes, start: int, end: int) -> Segment:
    text, before = (part.decode(errors="surrogatepass") for part in (source[start:end], source[:start]))
    return Segment(text, len(before), len(before) + len(text))


def analyse(command: str) -> Analysis:
    """Analyses a command, cached: several rules use one command, and a command is judged more than once."""
    return _analyse_short(command) if len(command) <= _CACHED else _analyse_long(command)


@lru_cache(maxsize=512)
def _analyse_short(command: str) -> Analysis:
    return _Analyst().analyse(command)


@lru_cache(maxsize=2)
def _analyse_long(command: str) -> Analysis:
    return _Analyst().analyse(command)


class _Analyst:
    def __init__(self) -> None:
        self.found = Analysis((0, 0))
        self.read_so_far = 0
        self.span = (0, 0)
        self.depth = 0
        self.runs_files = False
        self.scripts = set[str]()
        self.special: dict[str, _Reading] = {
            **dict.fromkeys(programs.SHELL_TEXT, self._shell_text),
            **dict.fromkeys(("source", "."), self._source),
            "eval": self._eval,
            "trap": self._trap,
            "alias": self._alias,
            "hash": self._hash,
            "find": self._find,
            "git": self._git,
        }

    def analyse(self, command: str) -> Analysis:
        self.span = self.found.whole = (0, len(command.encode(errors="surrogatepass")))
        self._text(command)
        return self.found

    def _anything(self) -> None:
        self.found.anything.append(self.span)

    def _text(self, text: str) -> None:
        """Shell text: the command itself, or what a command gives to a shell."""
        self.read_so_far += len(text)
        if self.depth > _DEEPEST or self.read_so_far > 4 * LARGEST or UNKNOWN & set(text):
            self._anything()
            return
        try:
            script = read(text)
        except NotUnderstood:
            self._anything()
            return
        for loose in script.loose:
            self._mention(loose)
        self._runs(script.runs)

    def _runs(self, runs: Sequence[Run]) -> None:
        outer, self.depth = self.span, self.depth + 1
        passing: list[Run] = []
        running = set[int]()
        for run in runs:
            self._place(run, outer)
            before, self.runs_files = self.runs_files, False
            self._run(run)
            if self.runs_files:
                running.add(id(run))
            elif self._passes_on(run, running):
                passing.append(run)
            self.runs_files |= before
        if self.runs_files:
            for run in passing:
                self._place(run, outer)
                self._pass_on(run, runs)
            for run in runs:
                self._place(run, outer)
                self._check_written(run)
        self.span, self.depth = outer, self.depth - 1

    def _place(self, run: Run, outer: tuple[int, int]) -> None:
        self.span = (run.start, run.end) if self.depth == 1 else outer
        if self.depth == 1:
            self.found.spans[self.span] = None

    def _pass_on(self, run: Run, runs: Sequence[Run]) -> None:
        """Reads a command's output as a script if a program may run it, or it is written to a file that may be run."""
        self._mention(*run.words[1:], *run.inputs)
        if any(self.scripts & _written(other) for other in runs):
            for text in (*run.words[1:], *run.inputs):
                for variant in {text, re.sub(r"\\[nt]", "\n", text)}:
                    if not variant.isalnum():
                        self._text(variant)

    def _check_written(self, run: Run) -> None:
        """A file that is written and then run contains the arguments of `echo` or `cat`; any other content is unknown."""
        name = known_name(run.words[0]) if run.words else "cat"
        if name in ("cp", "mv", "ln") or not self.scripts & _written(run):
            return
        if name not in ("echo", "printf") and (name != "cat" or len(run.words) > 1):
            self._anything()

    def _passes_on(self, run: Run, running: set[int]) -> bool:
        """Whether what this one prints may reach a program that runs it, or a file that is run."""
        around: Run | None = run
        while around is not None:
            if around.flows or id(around) in running:
                return True
            around = around.inside
        return False

    def _run(self, run: Run) -> None:
        for assignment in run.assignments:
            self._assign(assignment)
        start = next((i for i, word in enumerate(run.words) if word not in _KEYWORDS), len(run.words))
        if start < len(run.words):
            self._invoke(run.words[start:], run.inputs)

    def _assign(self, text: str) -> None:
        _, _, value = text.partition("=")
        if programs.SHELL_FILES.match(text) or (text.startswith("PS4") and re.search(r"[$`]", value)):
            self._anything()
        self._git_config(text)
        self._mention(value)

    def _git_config(self, text: str) -> None:
        if "alias." in text.lower():
            self._add(["git", MANY])

    def _add(self, words: Sequence[str], first: int = 0, last: int = 0) -> None:
        self.found.invocations.append(Invocation(words, first, last, self.span))

    def _mention(self, *texts: str) -> None:
        words = tuple(word for text in texts for word in _loose_words(text))
        if words:
            self.found.texts.append(_Text(words, self.span))

    # -- one command

    def _invoke(self, words: Sequence[str], inputs: Sequence[str]) -> None:
        while True:
            self._add(words)
            name = known_name(words[0])
            if name is None:
                self._anything()
                return
            if name not in programs.WRAPPERS:
                break
            inner = self._wrapped(name, words)
            if not inner:
                return
            words = inner
        self._kind_of(name)(words, inputs)

    def _kind_of(self, name: str) -> "_Reading":
        if reading := self.special.get(name):
            return reading
        if programs.SHELL.fullmatch(name):
            return self._shell
        if name in programs.INERT:
            return self._inert
        if name in programs.TOOLS or name in programs.SUBCOMMANDS or programs.INTERPRETER.fullmatch(name):
            return self._tool
        return self._unknown

    def _inert(self, words: Sequence[str], inputs: Sequence[str]) -> None:
        name = known_name(words[0]) or ""
        if name in programs.DECLARES:
            for word in words[1:]:
                self._assign(word)
        options = programs.RUNNING_OPTIONS.get(name)
        if options and any(word.startswith(options) for word in words):
            self._unknown(words, inputs)
        if name in programs.SUBSCRIPTS and any(re.search(r"\$\(|`", word) for word in words):
            self._anything()

    def _unknown(self, words: Sequence[str], inputs: Sequence[str]) -> None:
        """A program that may run its arguments, or text in them."""
        self.runs_files = True
        self.scripts.add(_file(words[0]))
        if any(_is_gap(word) for word in words[1:]):
            self._anything()
            return
        self._any_of(words, 1, inputs)

    def _any_of(self, words: Sequence[str], start: int, inputs: Sequence[str]) -> None:
        """Any word from `start` may be the program that runs, or text that names it."""
        self._add(words, start, len(words))
        self._mention(*words[start:], *inputs)
        for i in range(start, len(words)):
            name = known_name(words[i])
            if name is not None and programs.SHELL.fullmatch(name):
                self._shell_command(words[i:])
            elif name in programs.SHELL_TEXT or name == "eval":
                self._shell_text(words[i:], ())
                return

    def _tool(self, words: Sequence[str], inputs: Sequence[str]) -> None:
        name = known_name(words[0]) or ""
        self.runs_files |= name not in programs.QUIET_TOOLS
        start = _subcommand(name, words) + 1 if name in programs.SUBCOMMANDS else 1
        hands_on = next((i for i in range(1, len(words)) if words[i] in programs.HANDS_ON), len(words))
        if any(word in (ONE, MANY) or MANY in word for word in words[hands_on:]):
            self._anything()
        elif start <= len(words):
            self._any_of(words, start, inputs)

    def _find(self, words: Sequence[str], inputs: Sequence[str]) -> None:
        starts = [i + 1 for i, word in enumerate(words) if word in ("-exec", "-execdir", "-ok", "-okdir")]
        if not starts and any(word in (";", "+") for word in words) and any(map(_is_gap, words)):
            self._anything()
        for start in starts:
            end = next((i for i in range(start, len(words)) if words[i] in (";", "+")), len(words))
            if start < end:
                self._invoke([word.replace("{}", ONE) for word in words[start:end]], inputs)

    def _git(self, words: Sequence[str], inputs: Sequence[str]) -> None:
        at = _subcommand("git", words)
        for i, word in enumerate(words):
            self._git_config(word)
            if i < at and (words[i - 1].startswith("-c") or word.startswith(("-c", "--config"))):
                self._mention(word)
        before = [word for word in words[1:at] if word.startswith("-")]
        is_sure = all(word in programs.GIT_FLAGS | programs.VALUES["git"] or "=" in word for word in before)
        if at >= len(words):
            if any(MANY in word for word in words):
                self._anything()
        elif any(MANY in word for word in words[1:at]) or _is_gap(words[at]):
            self._anything()
        elif words[at] not in programs.GIT_INERT or not is_sure:
            read = self._tool if words[at] in programs.GIT_REMOTE else self._unknown
            read(words[at:] if read == self._unknown else words, inputs)

    # -- shells

    def _shell(self, words: Sequence[str], inputs: Sequence[str]) -> None:
        self.runs_files = True
        if self._shell_command(words) or words[1:] in (["--version"], ["--help"]):
            return
        at, reads_input = _shell_operand(words)
        if at < len(words) and not reads_input and not _is_stream(words[at]):
            self.scripts.add(_file(words[at]))
            return
        if at < len(words) and UNKNOWN & set(words[at]) and not reads_input:
            self._anything()
        for text in inputs:
            self._text(text)
        if not inputs:
            self._anything()

    def _shell_command(self, words: Sequence[str]) -> bool:
        """Whether there is a `-c`; its text is read."""
        at, _ = _shell_operand(words)
        options = [word for word in words[1:at] if word[:1] in ("-", "+")]
        if any(UNKNOWN & set(word) or " " in word for word in words[1:at]):
            self._anything()
        if not any("c" in word.lower() and not word.startswith("--") for word in options):
            return "--command" in options and self._given(words[at : at + 1])
        return self._given(words[at : at + 1])

    def _given(self, texts: Sequence[str]) -> bool:
        for text in texts:
            self._text(text)
        return True

    def _shell_text(self, words: Sequence[str], inputs: Sequence[str]) -> None:
        """A program that gives its arguments, one or all, to a shell."""
        self.runs_files = True
        if any(_is_gap(word) for word in words[1:]):
            self._anything()
            return
        self._add(words, 1, len(words))
        self._mention(*words[1:], *inputs)
        for text in (*words[1:], *inputs):
            if not text.isalnum():
                self._text(text)
        self._text(" ".join(words[1:]))

    def _eval(self, words: Sequence[str], _: Sequence[str]) -> None:
        self.runs_files = True
        self._text(" ".join(words[1:]))

    def _trap(self, words: Sequence[str], _: Sequence[str]) -> None:
        for word in words[1:]:
            if not word.isalnum():
                self._text(word)

    def _source(self, words: Sequence[str], _: Sequence[str]) -> None:
        self.runs_files = True
        if len(words) > 1:
            self.scripts.add(_file(words[1]))
            if _is_stream(words[1]):
                self._anything()

    def _alias(self, words: Sequence[str], _: Sequence[str]) -> None:
        for word in words[1:]:
            if UNKNOWN & set(word):
                self._anything()
            elif "=" in word:
                self._text(word.partition("=")[2] + ' "$@"')

    def _hash(self, words: Sequence[str], _: Sequence[str]) -> None:
        for word in words[1:]:
            self._add([word, MANY])

    # -- programs that run their arguments

    def _wrapped(self, name: str, words: Sequence[str]) -> Sequence[str]:
        """The command that a wrapper runs; empty if there is none, or no certain one and all readings are noted."""
        if name == "env" and any(re.match(r"-[a-zA-Z0-9]*S|--s", word) for word in words):
            self._env_text(words)
            return ()
        start = _program_of(name, words)
        if start is None:
            self._unknown(words if name != "xargs" else [*words, MANY], ())
            return ()
        for word in words[1:start]:
            if "=" in word and not word.startswith("-"):
                self._assign(word)
        self._add(words, 1, start)
        if start == len(words):
            if name in ("sudo", "doas"):  # a shell, by an option
                self.runs_files = True
                self._anything()
            return ()
        return _fed(words, start) if name == "xargs" else words[start:]

    def _env_text(self, words: Sequence[str]) -> None:
        if any("\\" in word or "$" in word for word in words):
            self._anything()
        self._shell_text(
            ["env", *(re.sub(r"^(-[a-zA-Z0-9]*S|--s[a-z-]*=?)", "", word) for word in words[1:])], ()
        )


type _Reading = Callable[[Sequence[str], Sequence[str]], None]


def _is_gap(word: str) -> bool:
    """Whether the word may be another command, or several words. A path that a shell made for itself is none."""
    return MANY in word or (ONE in word and not word.startswith("/dev/fd/"))


def _is_stream(word: str) -> bool:
    """Whether a file's name may be that of an open file, which the command itself may have written."""
    plain = word.strip(ONE + MANY + GLOB)
    return not plain or word.startswith(("/dev/", "/proc/", "-")) or MANY in word


def _file(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _written(run: Run) -> set[str]:
    """The files that a command writes."""
    copies = run.words and known_name(run.words[0]) in ("tee", "cp", "mv", "ln", "dd", "install")
    return {_file(name.removeprefix("of=")) for name in (*run.writes, *(run.words[1:] if copies else ()))}


def _subcommand(name: str, words: Sequence[str]) -> int:
    """Where a tool's first operand stands."""
    values = programs.VALUES.get(name, frozenset[str]())
    i = 1
    while i < len(words) and words[i].startswith(("-", "+")):
        i += 2 if words[i] in values else 1
    return i


def _shell_operand(words: Sequence[str]) -> tuple[int, bool]:
    """The index of a shell's first operand, and whether the shell also reads its input (`-s`)."""
    i, reads_input = 1, False
    while i < len(words) and words[i][:1] in ("-", "+") and len(words[i]) > 1:
        word = words[i]
        i += 1
        if word == "--":
            break
        is_short = not word.startswith("--")
        reads_input |= is_short and "s" in word
        if (is_short and word[-1] in "oO") or word in ("--rcfile", "--init-file"):
            i += 1
    return i, reads_input


def _program_of(name: str, words: Sequence[str]) -> int | None:
    """Index of the program that a wrapper runs; None if it depends on unknown text."""
    operands, values, flags = programs.WRAPPERS[name]
    i = 1
    while i < len(words):
        word = words[i]
        if word.startswith("-") and len(word) > 1:
            step = _option_length(word, values, flags)
            if step is None:
                return None
            i += step
        elif "=" in word and name in ("env", "sudo", "doas") and MANY not in word:
            i += 1
        elif _is_gap(word):
            return None
        elif operands:
            operands -= 1
            i += 1
        else:
            break
    return min(i, len(words))


def _option_length(word: str, values: str, flags: str) -> int | None:
    """How many words an option takes; None if that is not known."""
    if MANY in word:
        return None
    if word == "--" or (word.startswith("--") and "=" in word):
        return 1
    if word.startswith("--"):
        return None
    for i, letter in enumerate(word[1:], 2):
        if letter in values:
            return 1 if i < len(word) else 2
        if letter not in flags and not letter.isdigit():
            return None
    return 1


def _fed(words: Sequence[str], start: int) -> Sequence[str]:
    """The command that xargs runs, with the words that it reads."""
    for i, word in enumerate(words[1:start], 1):
        if match := re.match(r"-[0rtpxo]*[IJ](.*)", word):
            place = match[1] or words[i + 1]
            return [inner.replace(place, ONE) if place else MANY for inner in words[start:]]
    return [*words[start:], MANY]


def _loose_words(text: str) -> list[str]:
    """The words of any text: a program in another language, a list, an option's value."""
    if not UNKNOWN & set(text) and text.isalnum():
        return [text]
    spaced = re.sub(r"\\[abefnrtv]", " ", text)
    variants = (
        re.sub(r"""["'\\]""", "", text),
        re.sub(r"""["'\\]""", "", spaced),
        re.sub(r"""["'\\]""", " ", spaced),
    )
    return [word for variant in dict.fromkeys(variants) for word in _tokens(variant)]


def _tokens(text: str) -> Iterator[str]:
    for word in re.split(r"[\s,;&|<>(){}=\[\]`!]+", text):
        if word:
            yield word
            if word[0] == "-" and len(word) > 2 and word[1] != "-":
                yield word[2:]
