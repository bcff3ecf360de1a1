"""Reads shell text into the simple commands that it may run, wherever they stand.

tree-sitter finds where quotes, substitutions and here-documents begin and end. What it finds is checked
against the text, and anything that a shell might read in another way raises `NotUnderstood`: the caller then
takes the text for whatever it is afraid of. Between the words, every operator and keyword counts as a place where a
command may begin, which holds for bash, zsh and dash.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import tree_sitter_bash
from tree_sitter import Language, Node, Parser

# Parts of a word that are known only at run time. One word; any number of words; a pattern for file names.
ONE, MANY, GLOB = "\x01", "\x02", "\x03"
UNKNOWN = frozenset({ONE, MANY, GLOB})

# Bytes. The grammar's time for text with errors grows with the square of its length: at worst about a second for this.
LARGEST = 16 * 1024
# Nodes of the syntax tree. Real commands have less than a thousand.
MOST_NODES = 10_000
# The grammar's time for here-documents that never end grows with the square of their number.
MOST_DOCUMENTS = 200

_LANGUAGE = Language(tree_sitter_bash.language())

# Unquoted `{`, `,`, `}`, `[` and `]` while a word is put together: only then it is known whether they expand.
_OPEN, _COMMA, _CLOSE, _FIRST, _LAST = "\x04", "\x05", "\x06", "\x07", "\x08"
_UNQUOTED = str.maketrans(
    {"*": GLOB, "?": GLOB, "{": _OPEN, ",": _COMMA, "}": _CLOSE, "[": _FIRST, "]": _LAST}
)
_LITERAL = str.maketrans({_OPEN: "{", _COMMA: ",", _CLOSE: "}", _FIRST: "[", _LAST: "]"})
_BRACES = re.compile(f"{_OPEN}.*(?:{_COMMA}|\\.\\.).*{_CLOSE}", re.DOTALL)
_BRACKETS = re.compile(f"{_FIRST}.+{_LAST}", re.DOTALL)

_WORDS = frozenset(
    {"word", "string", "raw_string", "ansi_c_string", "translated_string", "concatenation", "number"}
    | {
        "simple_expansion",
        "expansion",
        "command_substitution",
        "process_substitution",
        "arithmetic_expansion",
    }
    | {"brace_expression", "variable_assignment", "variable_name", "special_variable_name", "subscript"}
    | {"extglob_pattern", "regex", "test_operator", "array"}
)
_CONTAINERS = frozenset(
    {"program", "command", "command_name", "redirected_statement", "file_redirect", "herestring_redirect"}
    | {"list", "pipeline", "subshell", "compound_statement", "if_statement", "elif_clause", "else_clause"}
    | {"while_statement", "for_statement", "case_statement", "do_group", "negated_command"}
    | {"declaration_command", "unset_command", "variable_assignments", "heredoc_redirect"}
)
_SEPARATORS = frozenset({";", "&", "&&", "|", "||", "|&", ";;", ";&", ";;&", "(", ")", "\n"})
_KEYWORDS = frozenset(
    {"if", "then", "else", "elif", "fi", "while", "until", "do", "done", "esac", "{", "}", "!", "function"}
)
_AS_WORDS = frozenset(
    {"for", "select", "case", "in", "declare", "typeset", "export", "readonly", "local", "unset", "unsetenv"}
)
_ENDINGS = frozenset({")", "}", "done", "fi", "esac"})
_WRITES = frozenset({">", ">>", ">|", "&>", "&>>"})
_REDIRECTIONS = _WRITES | {"<", ">&", "<&", "<>", ">&-", "<&-", "<<<"}
_CLOSES = frozenset({">&-", "<&-"})

_GAP = re.compile(rb"(?:[ \t\n]|\\\n)*")
# The grammar loses a lone `-` before a here-document.
_LOST = re.compile(rb"[ \t]+-[ \t]+")
_JOINED = re.compile(rb"(?:\\\n)*")
_PLAIN_WORD = re.compile(r"(?:[^\s\x00-\x20\x7f'\"`$\\;&|<>()]|\\[^\r\n])+")
_PLAIN_NAME = re.compile(rb"\$(?:\w+|[@*#?$!-])")
_PLAIN_EXPANSION = re.compile(rb"\$\{[\w#!@*?$^=~-][^'\"`\\\n{}]*\}")
_DOUBLE_QUOTED = re.compile(rb'(?:[^"`\\$]|\\.|\$(?![\w{(@*#?!$\[-]))*', re.DOTALL)
_RUNS_SOMETHING = re.compile(rb"(?<!\\)(?:\\\\)*(?:`|\$\(|\$\{)")
_DELIMITER = re.compile(rb"'(\w+)'|\"(\w+)\"|\\?(\w+)")
_SUBSCRIPTED = re.compile(rf"[A-Za-z_]\w*{_FIRST}[^{_LAST}]*{_LAST}\+?=")
_ANSI = re.compile(r"\\(?:x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{1,4}|U[0-9a-fA-F]{1,8}|[0-7]{1,3}|c.|.)", re.DOTALL)
_ANSI_NAMES = {
    "a": "\a",
    "b": "\b",
    "e": "\x1b",
    "E": "\x1b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}


class NotUnderstood(Exception):
    """This text may run anything."""


@dataclass(slots=True)
class Run:
    """One simple command: what may be a program and its arguments, as far as they are known.

    `inputs` are here-documents and here-strings. `flows`: what it prints goes to another program or a file;
    `writes` are the files.
    `inside` is the command that has this one in a substitution. `start` and `end` are positions in bytes.
    """

    words: list[str]
    assignments: list[str]
    inputs: list[str]
    start: int
    end: int
    flows: bool = False
    inside: "Run | None" = None
    writes: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class Script:
    """All that a text may run. `loose`: arithmetic, whose words are commands to some shells."""

    runs: list[Run] = field(default_factory=list["Run"])
    loose: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class _Token:
    """`kind`: "word", "keyword" (a word that ends where it ends), "redirect", "separator", "document", "skip"."""

    kind: str
    start: int
    end: int
    text: str = ""
    nested: Sequence[Node] = ()
    is_assignment: bool = False


def read(text: str) -> Script:
    """Raises NotUnderstood if the text is too long or too intricate, is no text, or may be read in several ways."""
    try:
        source = text.encode()
    except UnicodeEncodeError as error:
        raise NotUnderstood from error
    if (
        len(source) > LARGEST
        or source.count(b"<<") > MOST_DOCUMENTS
        or any(char < 32 and char not in b"\t\n" for char in source)
    ):
        raise NotUnderstood
    root = Parser(_LANGUAGE).parse(source).root_node
    if root.has_error or root.descendant_count > MOST_NODES:
        raise NotUnderstood
    return _Reader(source).read(root)


class _Reader:
    def __init__(self, source: bytes) -> None:
        self.source = source
        self.script = Script()
        self._documents, self._document_end = (0, False), 0

    def read(self, root: Node) -> Script:
        waiting: list[tuple[Node, Run | None]] = [(root, None)]
        while waiting:
            node, inside = waiting.pop()
            first, last = (
                (0, len(self.source)) if inside is None and node is root else _inner(node, self.source)
            )
            tokens = self._tokens(node if node is root else node.children[1:-1])
            self._check_gaps(tokens, first, last)
            waiting.extend(self._runs(_merged(tokens, self.source), inside))
        return self.script

    # -- from the tree to tokens

    def _tokens(self, start: Node | Sequence[Node]) -> list[_Token]:
        tokens: list[_Token] = []
        stack = [start] if isinstance(start, Node) else list(reversed(start))
        while stack:
            node = stack.pop()
            stack.extend(reversed(self._read_node(node, tokens)))
        return tokens

    def _read_node(self, node: Node, tokens: list[_Token]) -> Sequence[Node]:
        """Adds the node's tokens, and returns those of its children that are still to be read."""
        kind = node.type
        if node.is_missing:
            raise NotUnderstood
        if kind in _WORDS:
            tokens.append(self._word(node))
        elif kind in _CONTAINERS:
            return self._children(node, tokens)
        elif kind in ("test_command", "case_item", "function_definition", "c_style_for_statement"):
            return self._compound(node, tokens)
        elif kind == "heredoc_start":
            tokens.append(self._document(node))
        elif kind == "heredoc_body":
            tokens.append(self._body(node, tokens))
        elif not node.child_count:
            tokens.append(self._leaf(node))
        else:
            raise NotUnderstood
        return ()

    def _children(self, node: Node, tokens: list[_Token]) -> Sequence[Node]:
        children = node.children
        if children and children[0].type == "((":
            tokens.append(self._arithmetic(node))
            return ()
        return children

    def _compound(self, node: Node, tokens: list[_Token]) -> Sequence[Node]:
        children = node.children
        if node.type == "function_definition":
            at = next(i for i, child in enumerate(children) if child.type == "word")
            tokens += [_Token("skip", child.start_byte, child.end_byte) for child in children[: at + 1]]
            return children[at + 1 :]
        if node.type == "case_item":  # its pattern is no command
            tokens.append(_Token("keyword", node.start_byte, node.start_byte, "case"))
            return children
        if node.type == "c_style_for_statement":
            end = next(i for i, child in enumerate(children) if child.type == "))")
            tokens.append(self._arithmetic(node, children[1].start_byte, children[end].end_byte))
            tokens[-1].start = node.start_byte
            return children[end + 1 :]
        if children[0].type == "((":
            return self._children(node, tokens)
        self._test(node, tokens)
        return ()

    def _test(self, node: Node, tokens: list[_Token]) -> None:
        stack = [node]
        while stack:
            part = stack.pop()
            if part.type in _WORDS:
                tokens.append(self._word(part))
            elif part.child_count:
                stack.extend(reversed(part.children))
            else:
                tokens.append(_Token("word", part.start_byte, part.end_byte, self._text(part)))

    def _leaf(self, node: Node) -> _Token:
        kind, start, end = node.type, node.start_byte, node.end_byte
        if kind in _SEPARATORS or kind in _KEYWORDS:
            return _Token("separator", start, end, kind)
        if kind in _AS_WORDS:
            return _Token("keyword", start, end, kind)
        if kind in _REDIRECTIONS:
            return _Token("redirect", start, end, kind)
        if kind == "comment":
            self._check_comment(start)
        elif kind not in ("file_descriptor", "<<", "<<-", "heredoc_end"):
            raise NotUnderstood
        return _Token("skip", start, end)

    def _check_comment(self, start: int) -> None:
        before = self.source[start - 1 : start]
        if before not in (b"", b" ", b"\t", b"\n", b";", b"&", b"|", b"(", b")") or self._is_continued(start):
            raise NotUnderstood

    def _is_continued(self, at: int) -> bool:
        return self.source[at - 2 : at] in (b"\\\n", b"\\ ", b"\\\t")

    # -- here-documents

    def _document(self, node: Node) -> _Token:
        """The here-document's whole text, found in the lines below as a shell does it."""
        match = _DELIMITER.fullmatch(node.text or b"")
        operator = node.prev_sibling
        line_end = self.source.find(b"\n", node.end_byte)
        if not match or operator is None or line_end < 0:
            raise NotUnderstood
        delimiter, is_quoted = next(filter(None, match.groups())), not match[3] or match[0] != match[3]
        body = self._lines_until(delimiter, line_end + 1, strip=operator.type == "<<-", joins=not is_quoted)
        if not is_quoted:
            body = f"{body}{ONE}" if re.search(r"[$`]", body) else body
        token = _Token("document", node.start_byte, node.end_byte, body)
        self._documents = (line_end, is_quoted)
        return token

    def _lines_until(self, delimiter: bytes, start: int, *, strip: bool, joins: bool) -> str:
        at, lines = start, list[bytes]()
        while True:
            end = self.source.find(b"\n", at)
            line = self.source[at : end if end >= 0 else len(self.source)]
            if (line.lstrip(b"\t") if strip else line) == delimiter:
                if joins and lines and lines[-1].endswith(b"\\"):
                    raise NotUnderstood
                break
            if end < 0 or (joins and line.endswith(b"\\") and delimiter.startswith(line[:-1].lstrip(b"\t"))):
                raise NotUnderstood
            lines.append(line)
            at = end + 1
        self._document_end = at
        return b"\n".join(lines).decode()

    def _body(self, node: Node, tokens: list[_Token]) -> _Token:
        after = node.next_sibling
        line_end, is_quoted = self._documents
        before = [token for token in tokens if token.kind != "skip" and token.start <= line_end]
        opened = sum(token.kind == "document" and token.end > self._line_start(line_end) for token in before)
        if after is None or after.type != "heredoc_end" or opened != 1:
            raise NotUnderstood
        if any(token.end > line_end for token in before) or self._document_end > after.start_byte:
            raise NotUnderstood
        if self.source[self._document_end : after.start_byte].strip(b"\t"):
            raise NotUnderstood
        nested = () if is_quoted else tuple(self._substitutions(node))
        if not is_quoted:
            rest = self._without(node.start_byte, after.start_byte, _expansions(node))
            if _RUNS_SOMETHING.search(rest):
                raise NotUnderstood
        return _Token("skip", line_end, after.start_byte, nested=nested)

    def _line_start(self, at: int) -> int:
        return self.source.rfind(b"\n", 0, at) + 1

    # -- words

    def _text(self, node: Node) -> str:
        return self.source[node.start_byte : node.end_byte].decode()

    def _word(self, node: Node) -> _Token:
        is_assignment = node.type == "variable_assignment"
        text = "".join(self._pieces(node, 0))
        nested = tuple(self._substitutions(node))
        return _Token("word", node.start_byte, node.end_byte, text, nested, is_assignment)

    def _pieces(self, node: Node, depth: int) -> Iterator[str]:
        kind = node.type
        if depth > 20:
            raise NotUnderstood
        if kind in ("string", "translated_string"):
            yield from self._quoted(node, depth)
        elif kind == "raw_string":
            yield self._text(node)[1:-1]
        elif kind == "ansi_c_string":
            yield _ansi(self._text(node))
        elif kind in ("simple_expansion", "expansion", "command_substitution"):
            yield MANY
        elif kind == "arithmetic_expansion":
            yield ONE
        elif kind == "process_substitution":
            yield f"/dev/fd/{ONE}"
        elif kind == "brace_expression":
            yield MANY
        elif kind == "regex" or not node.child_count:
            yield self._plain(node)
        else:
            yield from self._joined(node, depth)

    def _joined(self, node: Node, depth: int) -> Iterator[str]:
        at = node.start_byte
        for child in node.children:
            gap = self.source[at : child.start_byte]
            if not _JOINED.fullmatch(gap):
                if node.type not in ("array", "subscript"):
                    raise NotUnderstood
                yield " "
            yield from self._pieces(child, depth + 1)
            at = child.end_byte

    def _quoted(self, node: Node, depth: int) -> Iterator[str]:
        children = node.children
        if node.type == "translated_string" or not children or children[0].type != '"':
            string = next((child for child in children if child.type == "string"), None)
            if string is None:
                raise NotUnderstood
            yield from self._quoted(string, depth + 1)
            return
        at = children[0].end_byte
        for child in children[1:]:
            if child.type == "string_content":
                continue
            raw = self.source[at : child.start_byte]
            if not _DOUBLE_QUOTED.fullmatch(raw):
                raise NotUnderstood
            yield re.sub(r'\\(?:\n()|([$`"\\]))', r"\2", raw.decode())
            if child.type != '"':
                yield MANY if b"@" in (child.text or b"") else ONE
            at = child.end_byte

    def _plain(self, node: Node) -> str:
        text = self._text(node)
        if node.type == "regex" or not node.is_named:
            if _RUNS_SOMETHING.search(text.encode()):
                raise NotUnderstood
            return text
        if not _PLAIN_WORD.fullmatch(text):
            raise NotUnderstood
        parts = re.split(r"\\(.)", text)
        parts[::2] = [part.translate(_UNQUOTED) for part in parts[::2]]
        return "".join(parts)

    def _substitutions(self, node: Node) -> Iterator[Node]:
        """The commands that are substituted within this node; checks what stands around them."""
        stack = [node]
        while stack:
            part = stack.pop()
            if part.type in ("command_substitution", "process_substitution"):
                if part.children[0].type == "`" and b"\\" in (part.text or b""):
                    raise NotUnderstood
                yield part
                continue
            self._check_expansion(part)
            if part.type == "arithmetic_expansion":
                self.script.loose.append(self._text(part))
            stack.extend(reversed(part.children))

    def _check_expansion(self, node: Node) -> None:
        if node.type == "simple_expansion" and not _PLAIN_NAME.fullmatch(node.text or b""):
            raise NotUnderstood
        if node.type == "expansion":
            inner = [part for child in node.children for part in _expansions(child)]
            if not _PLAIN_EXPANSION.fullmatch(self._without(node.start_byte, node.end_byte, inner)):
                raise NotUnderstood

    def _without(self, start: int, end: int, nodes: Iterable[Node]) -> bytes:
        kept, at = list[bytes](), start
        for node in nodes:
            kept.append(self.source[at : node.start_byte])
            at = max(at, node.end_byte)
        return b"".join([*kept, self.source[at:end]])

    def _arithmetic(self, node: Node, start: int | None = None, end: int | None = None) -> _Token:
        first, last = start or node.start_byte, end or node.end_byte
        self.script.loose.append(self.source[first:last].decode())
        nested = tuple(part for part in self._substitutions(node) if first <= part.start_byte < last)
        return _Token("word", node.start_byte, last, "((", nested)

    # -- from tokens to commands

    def _check_gaps(self, tokens: list[_Token], first: int, last: int) -> None:
        at = first
        for token in [*tokens, _Token("skip", last, last)]:
            if token.start < at and token.kind != "skip":
                raise NotUnderstood
            gap = self.source[at : token.start]
            is_lost = self.source.startswith(b"<<", token.start) and _LOST.fullmatch(gap)
            if not is_lost and not _GAP.fullmatch(gap):
                raise NotUnderstood
            at = max(at, token.end)

    def _runs(self, tokens: list[_Token], inside: Run | None) -> Iterator[tuple[Node, Run | None]]:
        builder = _Builder(self.source, inside)
        for token in tokens:
            builder.add(token)
            run = builder.run
            for node in token.nested:
                yield node, run
        builder.finish()
        self.script.runs += builder.runs


class _Builder:
    """Puts the tokens of one list of commands together."""

    def __init__(self, source: bytes, inside: Run | None) -> None:
        self.source = source
        self.inside = inside
        self.runs: list[Run] = []
        self.at = 0
        self._begin()
        self.after_ending = False

    def _begin(self) -> None:
        self.run = self._new()
        self.redirect = ""
        self.split: Run | None = None

    def _new(self) -> Run:
        return Run([], [], [], -1, -1, inside=self.inside)

    def add(self, token: _Token) -> None:
        if b"\n" in self.source[self.at : token.start].replace(b"\\\n", b""):
            self.finish()
        is_next_to = self.at == token.start
        self.at = max(self.at, token.end)
        if token.kind == "separator":
            self._separate(token.text)
            return
        if token.kind == "skip":
            return
        if self.run.start < 0:
            self.run.start = token.start
        self.run.end = token.end
        if token.kind == "redirect":
            self.redirect = "" if token.text in _CLOSES else token.text
            if is_next_to and self.run.words and re.fullmatch(r"\{\w+\}", self.run.words[-1]):
                self.run.words.pop()  # `{fd}>file` is a redirection
        elif token.kind == "document":
            self.run.inputs.append(token.text)
        else:
            self._word(token)

    def _separate(self, text: str) -> None:
        if text in ("|", "|&"):
            self._flow()
        self.finish()
        self.after_ending = text in _ENDINGS

    def _flow(self) -> None:
        self.run.flows = True
        if self.after_ending:
            for run in self.runs:
                run.flows = True

    def _word(self, token: _Token) -> None:
        text = _expanded(token.text)
        redirect, self.redirect = self.redirect, ""
        if redirect == "<<<":
            self.run.inputs.append(text)
        elif redirect:
            if redirect in _WRITES and text != "/dev/null":
                self._flow()
                self.run.writes.append(text)
            # dash reads `a &>f b` as `a & >f b`.
            self.split = self._new() if redirect.startswith("&>") else self.split
        else:
            is_assignment = token.is_assignment and not self.run.words
            (self.run.assignments if is_assignment else self.run.words).append(text)
            if self.split is not None:
                self.split.words.append(text)

    def finish(self) -> None:
        if self.run.start >= 0:
            self.runs.append(self.run)
        if self.split is not None and self.split.words:
            self.split.start, self.split.end = self.run.start, self.run.end
            self.runs.append(self.split)
        self._begin()
        self.after_ending = False


def _merged(tokens: list[_Token], source: bytes) -> list[_Token]:
    """With words that nothing parts put together, as a shell does it."""
    merged: list[_Token] = []
    for token in tokens:
        last = merged[-1] if merged else token
        if (
            token.kind == last.kind == "word"
            and last is not token
            and _JOINED.fullmatch(source[last.end : token.start])
        ):
            last.text, last.end, last.nested = (
                last.text + token.text,
                token.end,
                (*last.nested, *token.nested),
            )
        else:
            merged.append(token)
        if token.kind == "word" and source[token.start : token.start + 1] == b"#":
            raise NotUnderstood
    return merged


def _inner(node: Node, source: bytes) -> tuple[int, int]:
    """Where the text between the signs of a substitution begins and ends."""
    children = node.children
    if len(children) < 2 or children[0].type not in ("$(", "<(", ">(", "`"):
        raise NotUnderstood
    if source[children[-1].start_byte : children[-1].end_byte] not in (b")", b"`"):
        raise NotUnderstood
    return children[0].end_byte, children[-1].start_byte


def _expansions(node: Node) -> list[Node]:
    """The outermost expansions in this node, in their order."""
    found: list[Node] = []
    stack = [node]
    while stack:
        part = stack.pop()
        if part.type.endswith(("_expansion", "_substitution")) or part.type == "expansion":
            found.append(part)
        else:
            stack.extend(reversed(part.children))
    return found


def _expanded(text: str) -> str:
    """With `{a,b}` as any number of words, `[ab]` as a pattern, and other braces and brackets as they are."""
    text = _BRACES.sub(MANY, text)
    if _FIRST in text and not _SUBSCRIPTED.match(text):
        text = _BRACKETS.sub(GLOB, text)
    return text.translate(_LITERAL)


def _ansi(raw: str) -> str:
    """The text of `$'...'`. dash ends it at the first quote, wherever that is."""
    if "\\'" in raw:
        raise NotUnderstood
    return _ANSI.sub(_ansi_character, raw[2:-1])


def _ansi_character(match: re.Match[str]) -> str:
    code = match[0][1:]
    if code[0] in "xuU" and len(code) > 1:
        value = int(code[1:], 16)
    elif code[0] in "01234567":
        value = int(code, 8)
    elif code[0] == "c":
        return " "
    else:
        return _ANSI_NAMES.get(code, code)
    return chr(value) if 32 <= value < 0xD800 or 0xE000 <= value < 0x110000 else " "
