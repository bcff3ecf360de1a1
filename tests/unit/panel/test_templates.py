"""Templates escape by default, contain all of the panel's HTML, and are packaged with the code."""

import ast
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from jinja2 import UndefinedError

from claude_hitl_template import code_version
from claude_hitl_template.cli.deploy import package
from claude_hitl_template.image.trees import copy_tree
from claude_hitl_template.panel import markup
from tests.unit.panel.components import line
from tests.unit.panel.html import Reader
from tests.unit.panel.nasty import texts

ROOT = Path(__file__).parents[3]
MARKUP = re.compile(r"</?[a-z]+[0-9]?[ />]")
ATTRIBUTE = re.compile(r'="(\{\{.*?\}\})"')
PANEL = Path(markup.__file__).parent
SHIPPED = sorted(path for name in ("templates", "static") for path in (PANEL / name).iterdir())


@given(texts)
def test_a_value_in_a_template_is_text_without_any_filter(given_text: str) -> None:
    reader = Reader(markup.render("note.html.j2", said=given_text))
    reader.check()
    assert {tag for tag, _ in reader.elements} <= {"div", "b"}
    assert not set("\u202e\x1b\x00\ufeff") & set(reader.text)


def test_html_of_a_macro_is_not_escaped_again() -> None:
    assert line(line("<x>")).count('<div class="hitl-dim">') == 2


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        markup.render("note.html.j2")


def test_no_html_is_in_the_python_code_of_the_panel() -> None:
    found = [
        f"{path.name}:{node.lineno}"
        for path in PANEL.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MARKUP.search(node.value)
    ]
    assert found == []


def test_every_attribute_holds_the_exact_value() -> None:
    """`{{ value }}` alone would add the marks of hidden characters, which are elements."""
    written = [value for path in SHIPPED for value in ATTRIBUTE.findall(path.read_text())]
    assert [value for value in written if not value.endswith("|e }}")] == []
    assert len(written) > 20


def test_a_deploy_and_an_image_have_every_template_style_and_script(tmp_path: Path) -> None:
    assert {path.suffix for path in SHIPPED} == {".j2", ".css", ".js"}
    uploaded = package.listed_files(ROOT)
    copy_tree(PANEL, tmp_path / "panel")
    for path in SHIPPED:
        assert path.relative_to(ROOT).as_posix() in uploaded
        assert (tmp_path / "panel" / path.relative_to(PANEL)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("changed", SHIPPED, ids=lambda path: path.name)
def test_a_changed_template_style_or_script_is_another_code_version(changed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "panel"
    shutil.copytree(PANEL, folder)
    before = code_version(folder)
    with (folder / changed.relative_to(PANEL)).open("a") as file:
        file.write("\n")
    assert code_version(folder) != before
