"""The pages' templates escape by default, have all of the HTML, and are packaged with the code, as their files are."""

import ast
import re
import shutil
from pathlib import Path

import pytest

from claude_hitl_template import CODE_SUFFIXES, code_version
from claude_hitl_template.cli.deploy import package
from claude_hitl_template.image.trees import copy_tree
from claude_hitl_template.inbox import pages

ROOT = Path(__file__).parents[3]
INBOX = Path(pages.__file__).parent
MARKUP = re.compile(r"</?[a-z]+[0-9]?[ />]")
TEMPLATES = sorted(pages.TEMPLATES.iterdir())
SHIPPED = [*TEMPLATES, *sorted(pages.STATIC.iterdir())]


def test_no_html_is_in_the_python_code_of_the_pages() -> None:
    found = [
        f"{path.name}:{node.lineno}"
        for path in INBOX.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MARKUP.search(node.value)
    ]
    assert found == []


def test_every_value_in_an_attribute_is_the_exact_value() -> None:
    """`{{ value }}` alone would add the marks of hidden characters, which are elements."""
    inside = re.compile(r'[a-z-]+="[^"<>]*?(\{\{(?:[^{}"]|"[^"]*")*\}\})')
    found = [(path.name, value) for path in TEMPLATES for value in inside.findall(path.read_text())]
    assert len(found) > 50
    constants = re.compile(r'\{\{ ("[a-z ]+"|loop\.index0\|e) (if|else)|\{\{ "[^"]*" if ')
    assert [(n, v) for n, v in found if not v.endswith("|e }}") and not constants.match(v)] == []


def test_no_template_has_a_script_or_a_style_of_its_own() -> None:
    for path in TEMPLATES:
        written = path.read_text()
        assert not re.search(r"<script(?! src=)|<style|\sstyle=|\son[a-z]+=|javascript:", written), path.name


def test_a_deploy_and_an_image_have_every_file(tmp_path: Path) -> None:
    uploaded = package.listed_files(ROOT)
    copy_tree(INBOX, tmp_path / "inbox")
    for path in SHIPPED:
        assert path.relative_to(ROOT).as_posix() in uploaded
        assert (tmp_path / "inbox" / path.relative_to(INBOX)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "changed", [path for path in SHIPPED if path.suffix in CODE_SUFFIXES], ids=lambda path: path.name
)
def test_a_changed_template_style_or_script_is_another_code_version(changed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inbox"
    shutil.copytree(INBOX, folder)
    before = code_version(folder)
    with (folder / changed.relative_to(INBOX)).open("a") as file:
        file.write("\n")
    assert code_version(folder) != before


def test_the_vendored_library_has_its_licence() -> None:
    assert "Zero-Clause BSD" in (pages.STATIC / "htmx.LICENSE.txt").read_text()
