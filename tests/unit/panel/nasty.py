"""Texts that try to become markup or hide their content."""

from hypothesis import strategies as st

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><a href='javascript:alert(1)'>x</a>",
    "</textarea><script>alert(1)</script>",
    "</pre></div></details><iframe srcdoc='<script>1</script>'>",
    "</style><script>x</script>",
    "<!-- --><![CDATA[",
    "[x](javascript:alert(1)) ![x](https://evil.example/?q=1)",
    "`</code><b onclick=x>`",
    '[x](https://a.b "t\\" onmouseover=alert(1)")',
    "<https://a.b/\"onclick='x'>",
    "| a |\n|---|\n| <script>x</script> |",
    "&lt;script&gt;&#x202e;&amp;",
    "{{ 7*7 }} {% raw %} ${x}",
    "\x1b[31mred\x1b[0m \u202e\u2066gnp.exe \x00\r\n\u2028\ufeff",
)
texts = st.one_of(
    st.sampled_from(PAYLOADS),
    st.text(max_size=60),
    st.builds("".join, st.lists(st.one_of(st.sampled_from(PAYLOADS), st.text(max_size=8)), max_size=4)),
)
values = st.recursive(
    st.one_of(texts, st.none(), st.booleans(), st.integers(-(10**6), 10**6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
tools = st.one_of(
    st.sampled_from(["Bash", "Write", "Edit", "AskUserQuestion", "ExitPlanMode", "Read", "mcp__x__y"]), texts
)


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, object]:
    """Generates inputs of the tools with their own view, in which any field may be missing or of another type."""
    option = st.fixed_dictionaries({"label": texts, "description": texts})
    question = st.fixed_dictionaries(
        {"question": texts, "options": st.lists(st.one_of(texts, option), max_size=3)},
        optional={"multiSelect": st.booleans()},
    )
    fields = st.fixed_dictionaries(
        {},
        optional={
            "command": st.one_of(texts, values),
            "description": texts,
            "file_path": texts,
            "content": texts,
            "old_string": texts,
            "new_string": texts,
            "plan": texts,
            "questions": st.one_of(st.lists(st.one_of(question, values), max_size=2), values),
            "answers": values,
        },
    )
    return {**draw(st.dictionaries(texts, values, max_size=2)), **draw(fields)}
