"""A path that leads elsewhere through links is shown with its target."""

import pytest

from claude_hitl_template.presentation.text import leads_to


@pytest.mark.parametrize(
    ("given", "targets", "shown"),
    [
        ({"file_path": "a.txt"}, ("./a.txt",), ""),
        ({"file_path": "./x/../a.txt"}, ("./a.txt",), ""),
        ({"file_path": "/w/a.txt"}, ("./a.txt",), ""),
        ({"file_path": "/etc/hosts"}, ("//etc/hosts",), ""),
        ({"path": "."}, ("./.",), ""),
        ({"command": "ls"}, (), ""),
        ({"file_path": "a.txt"}, None, ""),
        ({"file_path": "docs/a.txt"}, ("//outside/docs/a.txt",), "/outside/docs/a.txt"),
        ({"file_path": "docs/a.txt"}, ("./real/a.txt",), "./real/a.txt"),
        ({"file_path": "/tmp/a.txt"}, ("//private/tmp/a.txt",), "/private/tmp/a.txt"),
        ({"notebook_path": "n"}, ("./n", "//n"), "./n and /n"),
    ],
)
def test_where_a_path_leads_is_shown_where_it_does_not_say_so(
    given: dict[str, str], targets: tuple[str, ...] | None, shown: str
):
    assert leads_to(given, targets) == shown
