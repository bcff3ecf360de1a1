"""The prose of code and docs is plain, standard English: words that obscure who does what are refused.

Prose is every docstring, comment and string literal of a tracked .py file, and every line of other tracked files except
locks, JSON, images, and libraries of others with their licences. To refuse a further word, add a line to ODD_WORDS. A
real use (a user's name, a quotation) goes to ALLOWED with a reason.

    python tests/unit/test_words.py     # odd words per 10,000 words of prose, by folder
"""

import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# Pattern (case is ignored) and what to write instead.
ODD_WORDS = {
    r"who(?:m)?ever": "name who: the caller, the client, the next owner",
    r"nobody": "no one in particular is meant: say what does not happen, or name who does not do it",
    r"somebody": "name who: another process, a user",
    r"(?:is|are|was|were) told": "receives, is informed, gets a message; of errors: reported",
    r"besides?": "next to, in addition to, also, compared with",
    r"mend(?:s|ed|ing)?": "fix",
    r"hence": "therefore",
    r"thereof": "of it",
    r"in vain": "without effect, failed",
    r"anew": "again, restarts, recreates",
    r"lies (?:in|below|under|above|outside|elsewhere|on)": "is in, is stored in",
    r"(?:(?<=^)|(?<=[.:;!?] )|(?<=\"\"\"))what is(?= [a-z])(?![^.?]*\?)": "name it: 'Deleted files', not 'What is deleted'",
    r"of use": "useful, usable",
    r"as far as it goes": "say how far",
    r"whereof": "of which",
    r"goes by": "uses, follows, is called",
    r"(?:comes?|came) of": "results from, leads to",
    r"bec[ao]mes? of": "the outcome of, happens to",
    r"(?:tells?|told|said) of": "reports, describes",
    r"as told": "as requested",
    r"by chance": "randomly, accidentally",
    r"for ever": "indefinitely, endlessly",
    r"shall": "will, must, should",
    r"(?:any|every)body": "name who: any user, each caller",
    r"(?:is|are) well": "works, is healthy",
    r"(?:is|are) away": "is unreachable, does not answer",
    r"(?:is|are) at work": "is running, is using",
    r"stands? (?:in|under|behind|on)": "is in, is listed in, follows",
    r"without a word": "silently, without an error message",
    r"(?<!here )\b(?:is|are|was|were) no (?!longer\b|more\b|one\b|different\b|better\b)\w": "is not a",
}

# File, word as it stands there, and why it is right.
ALLOWED = {
    ("CHANGELOG.md", "mend"): "the former name of a JSON key",
    ("claude_hitl_template/claude/sandbox.py", "nobody"): "the system's user nobody",
    ("claude_hitl_template/cli/host/postgres.py", "nobody"): "the system's user nobody",
}


class Found(NamedTuple):
    path: str
    line: int
    word: str
    advice: str


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--", ".", ":!*.lock", ":!*.json", ":!*.png", ":!*.min.js", ":!*LICENSE*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    own = Path(__file__).relative_to(ROOT).as_posix()
    return [path for path in listed.stdout.splitlines() if path != own and (ROOT / path).is_file()]


def prose(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Line numbers and lines of prose: of Python only comments and string literals."""
    if not path.endswith(".py"):
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, tokenize.FSTRING_MIDDLE):
            yield from enumerate(token.string.splitlines(), token.start[0])


def odd_words(path: str, text: str) -> Iterator[Found]:
    for number, line in prose(path, text):
        for pattern, advice in ODD_WORDS.items():
            for match in re.finditer(
                pattern if pattern.startswith(("(?<", "(?:(?<")) else rf"\b{pattern}\b", line, re.IGNORECASE
            ):
                if (path, match[0].lower()) not in ALLOWED:
                    yield Found(path, number, match[0], advice)


def odd_words_by_folder() -> dict[str, tuple[int, int]]:
    """Number of odd words and of all words of prose, by the first two parts of the path."""
    odd: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for path in tracked_files():
        text = (ROOT / path).read_text()
        folder = "/".join(path.split("/")[:2])
        odd[folder] += sum(1 for _ in odd_words(path, text))
        words[folder] += sum(len(re.findall(r"[A-Za-z']+", line)) for _, line in prose(path, text))
    return {folder: (odd[folder], words[folder]) for folder in words}


@pytest.mark.parametrize("path", tracked_files())
def test_no_odd_word_is_in_the_prose(path: str) -> None:
    found = list(odd_words(path, (ROOT / path).read_text()))
    assert not found, "\n".join(f"{f.path}:{f.line}: {f.word!r}: {f.advice}" for f in found)


def test_a_word_is_found_in_comments_docstrings_messages_and_pages_but_not_in_names() -> None:
    code = '"""Nobody."""\nnobody = f"whoever {1}"  # anew\n'
    assert [(f.line, f.word) for f in odd_words("a.py", code)] == [(1, "Nobody"), (2, "whoever"), (2, "anew")]
    assert [f.word for f in odd_words("a.md", "What is left is kept.\nWhat is it?\n")] == ["What is"]


def test_every_exception_is_in_use() -> None:
    for path, word in ALLOWED:
        assert word in (ROOT / path).read_text().lower(), (path, word)


if __name__ == "__main__":
    rows = odd_words_by_folder()
    for folder, (odd, words) in sorted(rows.items(), key=lambda row: -row[1][0]):
        print(f"{10_000 * odd / max(words, 1):6.1f}  {odd:4} of {words:6}  {folder}")
    odd, words = (sum(column) for column in zip(*rows.values(), strict=True))
    print(f"{10_000 * odd / words:6.1f}  {odd:4} of {words:6}  all")
