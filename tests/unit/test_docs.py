"""The documents can be followed: links resolve, and commands exist."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.exceptions import TyperException

from claude_hitl_template import __version__
from claude_hitl_template.cli.app import ENTRIES, load
from claude_hitl_template.cli.commands.configuration import page

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


COMMANDS = set(ENTRIES)
PLACES = ("", "macos", "elsewhere")  # anywhere; on a Mac only; on another host
# The test that runs each command, as written in the documents; that of the quickstart reads its commands from there.
RUN = {
    **dict.fromkeys(
        ("python3 -m hatchling build --target wheel", "hitl demo", "./hitl upgrade --check"),
        "tests/first_hour/test_wheel.py::test_the_demo_runs_from_an_empty_folder_with_its_data_in_the_users",
    ),
    "./hitl upgrade": "tests/first_hour/test_wheel.py::test_an_older_data_folder_is_upgraded",
    "./hitl demo": "tests/acceptance/test_new_service.py::test_the_demo_that_allows_ends_well_and_the_file_is_there",
    "./hitl test": "tests/unit/test_docs.py::test_the_readmes_command_runs_the_tests_that_it_is_given",
    "./hitl check": ".ci/run::./hitl check",
    "./hitl backup FILE": "tests/integration/test_readme.py::test_a_backup_is_made_and_restored",
    "./hitl restore FILE": "tests/integration/test_readme.py::test_a_backup_is_made_and_restored",
    "./hitl up --postgres": (
        "tests/integration/test_own_postgres.py::"
        "test_what_waits_is_decided_after_service_and_postgres_were_killed_and_all_was_started_again"
    ),
    "./hitl image build --from-host": "tests/acceptance/test_containers.py::image",
    "./hitl image build --from-host --for-user ray": "tests/acceptance/test_containers.py::image",
    "sudo ./hitl bootstrap-host": ".ci/run::./hitl bootstrap-host",
    **dict.fromkeys(
        ("koco deploy -r", "koco spool", "koco serve --register http://localhost:8001/-/routes"),
        "tests/integration/test_plain_commands.py::test_the_panel_lists_the_entries_and_opens_their_forms",
    ),
    **dict.fromkeys(
        (
            f"./hitl secrets {what} --profile vm"
            for what in ("set ANTHROPIC_API_KEY", "list", "remove ANTHROPIC_API_KEY")
        ),
        "tests/integration/test_deploy.py::"
        "test_over_a_bad_line_a_package_is_sent_again_whole_and_a_secret_that_was_sent_before_counts",
    ),
    **dict.fromkeys(
        ("./hitl rules test rules.yaml", "./hitl rules set rules.yaml", "./hitl rules list"),
        "tests/unit/cli/test_rules_command.py::test_the_example_of_the_guide_is_set_and_shown",
    ),
    **dict.fromkeys(
        (
            "./hitl demo --answer allow",
            "./hitl status",
            "./hitl doctor",
            "./hitl sessions list",
            "./hitl approvals list",
        ),
        "tests/integration/test_readme.py::test_the_quickstarts_commands_run_as_they_stand",
    ),
    **dict.fromkeys(
        (f"./hitl {name} --profile vm" for name in ("deploy", "status", "doctor")),
        "tests/acceptance/test_two_hosts.py::test_a_changed_working_tree_is_live_after_the_commands_of_the_guide",
    ),
    **dict.fromkeys(
        (
            "./hitl workspaces create research",
            "./hitl workspaces set research --separation-of-duties",
            "./hitl keys create robot --workspace research --role requester --scope sessions --days 90",
            "./hitl keys create ann --workspace research --role approver",
            "./hitl workspaces members --workspace research",
            "./hitl workspaces roles ann --workspace research",
            "./hitl keys list",
            "./hitl keys revoke ID",
        ),
        "tests/unit/cli/test_keys_command.py::test_the_example_of_the_guide_runs_as_written",
    ),
    "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.hitl/secrets/ray-token grpc_proxy= "
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper=true .venv/bin/ray start --address=10.0.0.5:6379": (
        "tests/acceptance/test_two_hosts.py::"
        "test_once_others_may_join_what_is_parked_goes_on_on_another_node_workspace_included"
    ),
}
# What no test runs, and why; it is held against the command line's own description of itself, as all the others are.
NOT_RUN = {
    "pipx install dist/claude_hitl_template-*.whl": "the test installs with pip or uv",
    "export HITL_URL=http://127.0.0.1:8001/claude-hitl": "the services of the tests have addresses of their own",
    'export HITL_API_KEY="$(cat .hitl/secrets/api-key)"': "the services of the tests have folders of their own",
    "./hitl bench": "takes minutes",
    "./hitl bench --rounds 40 --json figures.json": "takes minutes",
    "./hitl bench --only crowd --sessions 10000": "takes minutes",
    "./hitl bench --only turns --only together --compare figures.json": "takes minutes",
    "./hitl bench --only storm --storm 25 --storm 100": "takes minutes",
    "./hitl soak --minutes 30": "takes half an hour",
    "./hitl image build": "needs a registry that has Ray's image",
    "./hitl image build --name HOST/NAME && ./hitl image push HOST/NAME:latest": "needs a registry",
    "./hitl image verify": "needs an image of this machine's own",
    "./hitl image prune": "removes what others on this machine left",
    **dict.fromkeys(
        (
            "umask 077 && mkdir -p secrets && touch secrets/anthropic_api_key",
            "openssl rand -hex 24 | tr -d '\\n' > secrets/postgres_password",
            'echo "postgresql://hitl:$(cat secrets/postgres_password)@db:5432/hitl" > secrets/database_url',
            "chmod 444 secrets/*",
            "docker compose up --build --detach --wait",
            "docker compose exec service hitl demo --answer allow",
            "docker compose exec service hitl status --show-secrets",
            "docker compose run --rm service hitl upgrade --check",
        ),
        "needs an engine with a registry; tests/unit/test_compose.py checks the file",
    ),
    "DATABASE_URL=postgresql://USER:PASSWORD@HOST:PORT/DATABASE ./hitl up": "needs an existing server",
}


def blocks(document: Path) -> list[tuple[str, str]]:
    """Returns the shell commands of a document: each block, with the machine that it is for."""
    return re.findall(r"^```sh ?(\w*)\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[tuple[str, str]]:
    """Returns the lines without comments, including indented ones, but not settings of a .env."""
    fenced = [(where, line) for where, block in blocks(document) for line in block.splitlines()]
    rest = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    indented = [("", line.strip()) for line in re.findall(r"^    \S.*$", rest, re.MULTILINE)]
    lines = [(where, re.sub(r"\s+#.*", "", line).strip()) for where, line in fenced + indented]
    return [(where, line) for where, line in lines if line and not re.fullmatch(r"[A-Z_]+=\{.*|\".*", line)]


def check_usage(line: str) -> None:
    """Asserts that each `./hitl` in the block has an existing command, options and values. Runs nothing."""
    for part in re.split(r"&&|[|;<>]", line):
        words = shlex.split(part)
        if "./hitl" not in words:
            continue
        words = words[words.index("./hitl") + 1 :]
        if not words or words[0].startswith("-"):
            continue
        assert words[0] in ENTRIES, line
        command = load(words.pop(0))
        while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
            name, *words = words
            assert name in command.commands, line
            command = command.commands[name]
        if isinstance(command, TyperGroup):
            continue  # it stands for all that is below it
        try:
            command.make_context(command.name, words)
        except TyperException as error:
            if type(error).__name__ != "MissingParameter":  # that, the sentence around it says
                pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere_and_commands_exist(document: Path):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (document.parent / target).exists(), target
    for command in re.findall(r"`([^`\n]*\./hitl [^`\n]*)`", text):
        check_usage(re.sub(r"[\[\]]", "", command))  # the parts in brackets are optional


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_a_document_names_exist(document: Path):
    named = re.findall(r"[\w/.]*\btest_\w+\.py", document.read_text())
    there = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in there)] == []


def test_decisions_are_numbered_without_a_gap_and_have_their_four_parts():
    records = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [int(record.name[:4]) for record in records] == [*range(1, len(records) + 1)]
    for record in records:
        parts = re.findall(r"^## (.*)$", record.read_text(), re.MULTILINE)
        assert parts == ["Context", "Decision", "Consequences", "Measurement"], record.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_of_commands_are_shell_and_say_where_they_run(document: Path):
    for where, block in blocks(document):
        assert where in PLACES
        subprocess.run(["bash", "-n", "-c", block], check=True)
    for _, line in commands(document):
        check_usage(line)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_command_is_run_by_a_test_or_is_for_a_mac(document: Path):
    unknown = [
        line for where, line in commands(document) if where != "macos" and line not in {**RUN, **NOT_RUN}
    ]
    assert not unknown, "name the test that runs it in RUN"


def test_the_tests_that_run_commands_are_there_and_no_command_is_named_that_no_document_has():
    for line, runner in RUN.items():
        path, _, name = runner.partition("::")
        assert re.search(
            rf"^(def |async def )?{re.escape(name)}\b", (ROOT / path).read_text(), re.MULTILINE
        ), line
    found = {line for document in DOCUMENTS for _, line in commands(document)}
    assert {*RUN, *NOT_RUN} == {line for line in found if line in {**RUN, **NOT_RUN}}


def test_the_readmes_command_runs_the_tests_that_it_is_given():
    command = [
        sys.executable,
        "-m",
        "claude_hitl_template.cli",
        "test",
        "tests/unit/domain/test_canonical_json.py",
        "-q",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_the_page_of_settings_is_as_the_command_makes_it():
    assert (ROOT / "docs/configuration.md").read_text() == page()


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(docs/([a-z-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_each_line_of_the_justfile_calls_a_command_that_exists():
    text = (ROOT / "justfile").read_text()
    assert re.search(r"^default:\n    @just --list\n", text, re.MULTILINE)
    assert text.index("default:") < text.index("start:")  # `just` alone runs the first recipe
    lines = re.findall(r"^    (\./.*)$", text, re.MULTILINE)
    called = [name for line in lines for name in re.findall(r'(?:^\./hitl |{ ")([a-z]+)', line)]
    assert len(called) == len(lines) + 2  # start and stop have two, of which one is called
    assert set(called) <= COMMANDS


def test_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
