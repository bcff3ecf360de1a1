"""Parses HTML as a browser would, to find out which parts of a payload became markup."""

from html.parser import HTMLParser

_ELEMENTS = """
a b blockquote br button code dd details div dl dt em h1 h2 h3 h4 h5 h6 hr input label li ol option p pre s script
select span strong style summary table tbody td textarea th thead tr ul
"""
_ATTRIBUTES = """
checked class data-limit formaction hidden href id multiple name open rel required rows selected spellcheck start style
tabindex target title type value
"""
ELEMENTS, ATTRIBUTES = frozenset(_ELEMENTS.split()), frozenset(_ATTRIBUTES.split())


class Reader(HTMLParser):
    """Parses a page. `texts` are its visible texts; `values`, the values of the form's fields by name."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.values: dict[str, str] = {}
        self._area = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        name = found.get("name") or ""
        if tag == "textarea":
            self._area, self.values[name] = name, ""
        elif tag == "input" and name:
            self.values[name] = found.get("value") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "textarea":
            # The parser of HTML drops the first line break of a textarea.
            self.values[self._area] = self.values[self._area].removeprefix("\n")
            self._area = ""

    def handle_data(self, data: str) -> None:
        if self._area:
            self.values[self._area] += data
        else:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    handle_decl = handle_pi = unknown_decl = handle_comment

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def check(self, ours: int = 0) -> None:
        """Asserts that a page contains only our own elements, and at most `ours` scripts."""
        for tag, attributes in self.elements:
            assert tag in ELEMENTS, tag
            assert set(attributes) <= ATTRIBUTES, attributes
            for name in ("href", "formaction"):
                target = attributes.get(name) or "/"
                assert target.startswith(("/", "http://", "https://", "mailto:")), target
        assert [tag for tag, _ in self.elements].count("script") <= ours
