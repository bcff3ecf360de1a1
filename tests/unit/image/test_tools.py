"""The calls of docker, podman and buildah, recorded by a fake program on PATH."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import tools
from claude_hitl_template.image.labels import VERSION

NASTY = (
    "a'b",
    "$(id)",
    "`id`",
    "a b",
    "a\nb",
    "--help",
    "../x",
    "a:b:c",
    "",
    "ä",
    "a;b",
    "a/B",
    "x@sha256:0",
    "a\x00",
)
type Install = Callable[..., Callable[[], list[list[str]]]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Returns a function that puts a program alone on PATH, which records its arguments and prints `says`, or fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, says: str = "", status: int = 0, digest: str = "") -> Callable[[], list[list[str]]]:
        noted = tmp_path / f"{name}.json"
        program = folder / name
        program.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"with open({str(noted)!r}, 'a') as f: f.write(json.dumps(sys.argv[1:]) + '\\n')\n"
            f"for a in sys.argv:\n  if a.startswith('--digestfile='): open(a[13:], 'w').write({digest!r})\n"
            f"print({says!r})\nsys.exit({status})\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return lambda: [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []

    return put


def test_the_first_that_is_there_is_taken_and_a_chosen_one_before_it(install: Install):
    install("docker")
    assert tools.find_tool().name == "docker"
    install("buildah")
    assert tools.find_tool().name == "buildah"
    install("podman")
    assert tools.find_tool().name == "podman"
    assert tools.find_tool("docker").name == "docker"


def test_one_that_is_missing_or_cannot_do_it_is_said(install: Install):
    with pytest.raises(ConfigError, match="apt install podman"):
        tools.find_tool()
    install("buildah")
    with pytest.raises(ConfigError, match="no podman here"):
        tools.find_tool("podman")
    with pytest.raises(ConfigError, match="buildah cannot do that"):
        tools.find_tool("buildah", among=("podman", "docker"))


@pytest.mark.parametrize("name", ["podman", "buildah", "docker"])
def test_a_build_is_one_list_of_arguments_with_values_as_they_are(
    install: Install, tmp_path: Path, name: tools.ToolName
):
    noted = install(name)
    value = """{"a":"it's $(id) \\" and `id`"}"""
    tools.find_tool().build(
        tmp_path, tags=["worker:1"], build_args={"RAY_BASE": "base:1"}, image_labels={"l": value}
    )
    (given,) = noted()
    assert given[0] == "build"
    assert given[-4:] == ["--tag=worker:1", "--build-arg=RAY_BASE=base:1", f"--label=l={value}", "."]


@pytest.mark.parametrize("image", NASTY)
def test_what_is_no_image_reference_reaches_no_program(install: Install, tmp_path: Path, image: str):
    noted = install("podman")
    podman = tools.find_tool()
    for act in (
        lambda: podman.push(image),
        lambda: podman.inspect(image),
        lambda: podman.build(tmp_path, tags=[image], build_args={}, image_labels={}),
    ):
        with pytest.raises(ConfigError, match="cannot be used"):
            act()
    assert noted() == []


def test_after_a_push_the_digest_is_the_registrys_not_the_local_one(install: Install):
    digest = f"sha256:{'0a' * 32}"
    local = json.dumps(
        [{"Config": {}, "Digest": "sha256:local", "RepoDigests": ["r.example.org/w@sha256:local"]}]
    )
    install("podman", says=local, digest=digest)
    assert (
        tools.find_tool().push("r.example.org:5000/team/worker:1.0")
        == f"r.example.org:5000/team/worker@{digest}"
    )


def test_docker_tells_the_registrys_digest_after_a_push(install: Install):
    digests = ["other.example.org/worker@sha256:1", f"r.example.org/worker@sha256:{'0b' * 32}"]
    install("docker", says=json.dumps([{"Config": {}, "RepoDigests": digests}]))
    assert tools.find_tool().push("r.example.org/worker:1.0") == digests[1]


def test_a_program_that_fails_is_quoted_with_what_mends_it(install: Install):
    install("podman", says="no such image", status=125)
    with pytest.raises(ConfigError) as error:
        tools.find_tool().inspect("worker:1")
    assert "no such image" in str(error.value)
    assert "./hitl image build" in str(error.value)
    assert tools.find_tool().has("worker:1") is False


def test_pruning_removes_exited_containers_of_our_images_and_never_by_force(install: Install):
    noted = install("podman", says="0a1b\n2c3d")
    assert tools.prune() == 2
    listed, removed = noted()
    assert {"--filter=status=exited", f"--filter=label={VERSION}"} <= set(listed)
    assert removed == ["rm", "--ignore", "--", "0a1b", "2c3d"]


def test_pruning_nothing_removes_nothing(install: Install):
    noted = install("podman")
    assert tools.prune() == 0
    assert len(noted()) == 1
