"""What sessions in containers need is found before Ray is asked, and each thing that lacks is told with its mend."""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.cluster import containers
from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import labels

IMAGE = "localhost/worker:1"
OURS = {labels.RAY: version("ray"), labels.PYTHON: python_minor(), labels.MANIFEST: '{"npm": []}'}

type Podman = Callable[..., Path]


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Podman:
    """Puts a program that answers as given in podman's place."""

    def make(
        inspected: Any = None,
        *,
        driver: str = "overlay",
        pull: str = "no route",
        inspect: str = "",
        images: str = "",
    ) -> Path:
        info = json.dumps({"store": {"graphDriverName": driver}})
        (tmp_path / "info").write_text(info)
        (tmp_path / "images").write_text(images)
        (tmp_path / "image").write_text(json.dumps([inspected]))
        absent = inspect or f"Error: inspecting object: {IMAGE}: image not known"
        found = f"cat {tmp_path}/image" if inspected is not None else f"echo '{absent}' >&2; exit 125"
        program = tmp_path / "podman"
        program.write_text(
            f"#!/bin/sh\ncase $1 in\ninfo) cat {tmp_path}/info ;;\nimage) {found} ;;\n"
            f"pull) echo 'trying' >&2; echo 'Error: {pull}' >&2; exit 125 ;;\n"
            f"images) cat {tmp_path}/images ;;\nesac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return program

    return make


def image(said: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    return {"Id": "0123456789abcdef", "Labels": OURS if said is None else said, "Config": {}, **more}


def found(name: str, reference: str = IMAGE) -> tuple[str, str, str]:
    """(level, what was found, mend) of the named check."""
    (check,) = [check for check in containers.examine(reference) if check.name == name]
    return check.level, check.found, check.fix


def test_an_image_of_ours_is_well(podman: Podman):
    podman(image())
    assert found("image versions")[0] == found("image")[0] == found("podman storage")[0] == "ok"
    assert found("image entry point")[0] == "ok"


def test_root_is_told_to_be_somebody_else(podman: Podman):
    podman(image())
    level, _, fix = found("user")
    assert level == ("wrong" if os.getuid() == 0 else "ok")
    if os.getuid() == 0:
        assert "useradd" in fix
        with pytest.raises(ConfigError, match="Ray runs as root"):
            containers.preflight(IMAGE)


def test_without_podman_nothing_else_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    names = [check.name for check in containers.examine(IMAGE)]
    assert names == ["user", "podman"]
    assert found("podman") == ("wrong", "not found on PATH", "apt install podman uidmap fuse-overlayfs")


def test_a_driver_that_copies_the_image_is_warned_about(podman: Podman):
    podman(image(), driver="vfs")
    level, said, fix = found("podman storage")
    assert (level, "vfs" in said, "fuse-overlayfs" in fix) == ("warning", True, True)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({**OURS, labels.RAY: "2.1.0"}, f"Ray 2.1.0 in the image, {version('ray')} here"),
        ({**OURS, labels.PYTHON: "3.9"}, f"Python 3.9 in the image, {python_minor()} here"),
        ({}, "was not built by ./hitl image build"),
    ],
)
def test_an_image_of_another_world_is_refused(podman: Podman, said: dict[str, str], why: str):
    podman(image(said))
    level, text, fix = found("image versions")
    assert (level, why in text, "./hitl image build" in fix) == ("wrong", True, True)


def test_an_image_without_labels_at_all_is_refused(podman: Podman):
    podman({"Id": "0", "Labels": None, "Config": None})
    assert found("image versions")[0] == "wrong"


def test_an_entry_point_is_refused(podman: Podman):
    podman(image(Config={"Entrypoint": ["/bin/sh"]}))
    assert found("image entry point")[0] == "wrong"


@pytest.mark.parametrize("kind", ["Id", "RepoDigests"])
def test_a_digest_that_only_this_machine_knows_is_told_from_a_registrys(podman: Podman, kind: str):
    local = "ab" * 32
    here = {"Id": "cd" * 32, "RepoDigests": [f"localhost/worker@sha256:{'ef' * 32}"]}
    here[kind] = local if kind == "Id" else [f"localhost/worker@sha256:{local}"]
    podman(images=json.dumps([here]))
    level, said, fix = found("image", f"registry.example/worker@sha256:{local}")
    assert (level, "own one of localhost/worker" in said, "image push" in fix) == ("wrong", True, True)
    said = found("image", f"registry.example/worker@sha256:{'00' * 32}")[1]
    assert "own one" not in said


def test_an_image_of_this_machine_that_is_not_there_is_not_looked_for_elsewhere(podman: Podman):
    podman()
    level, said, fix = found("image")
    assert (level, "is not on this machine" in said, "--from-host" in fix) == ("wrong", True, True)
    assert "pulled" not in said


@pytest.mark.parametrize("why", ["no route to host", "manifest unknown", "unauthorized"])
def test_an_image_that_cannot_be_pulled_says_why(podman: Podman, why: str):
    podman(pull=why)
    level, said, _ = found("image", "registry.example.org/worker@sha256:" + "0" * 64)
    assert (level, f"could not be pulled: Error: {why}" in said) == ("wrong", True)


def test_a_podman_that_fails_is_not_taken_for_a_missing_image(podman: Podman):
    podman(inspect="Error: database is locked")
    level, said, _ = found("image")
    assert (level, "database is locked" in said) == ("wrong", True)


def test_a_tag_that_may_move_is_warned_about_and_a_digest_is_not(podman: Podman):
    podman(image())
    tagged, digest = "registry.example.org/worker:1", "registry.example.org/worker@sha256:" + "0" * 64
    assert found("image name", tagged)[0] == "warning"
    assert "image name" not in [check.name for check in containers.examine(digest)]


def test_ids_are_looked_up_by_name_and_by_number(tmp_path: Path):
    has, has_not = tmp_path / "subuid", tmp_path / "subgid"
    has.write_text("other:1:2\n4242:100000:65536\n")
    has_not.write_text("somebody:100000:65536\nada:\n")
    for files, level in (((has, has), "ok"), ((has, has_not), "wrong"), ((tmp_path / "none",), "wrong")):
        check = containers.ids_check("ada", 4242, files)
        assert check.level == level
    assert "usermod --add-subuids" in containers.ids_check("ada", 4242, (has_not,)).fix


def test_the_digest_that_is_shown_is_the_registrys():
    digest = "sha256:" + "ab" * 32
    both = image(RepoDigests=[f"localhost/worker@sha256:{'0' * 64}", f"registry.example.org/worker@{digest}"])
    assert containers.facts(IMAGE, both).digest == digest
    assert containers.facts(IMAGE, image(RepoDigests=[f"localhost/worker@sha256:{'0' * 64}"])).digest is None
    assert containers.facts(IMAGE, image()).manifest == {"npm": []}


@pytest.mark.parametrize("label", ["", "no json", "[]", "null"])
def test_a_manifest_that_is_none_is_empty(label: str):
    assert containers.facts(IMAGE, image({labels.MANIFEST: label})).manifest == {}


@pytest.mark.parametrize("reference", ["a'b", "a b", "$(touch x)", "--privileged", "x\n", ""])
def test_nothing_but_an_images_name_reaches_ray(reference: str):
    with pytest.raises(ValueError, match="not an image reference"):
        containers.runtime_env(reference)


def test_the_reason_of_a_container_that_did_not_start_names_what_is_wrong_now(podman: Podman):
    podman()
    said = containers.why_not_started(IMAGE, "Error: whatever Ray says")
    assert "Fix:" in said
    assert "whatever Ray says" not in said


def test_a_container_does_not_show_the_machines_name(podman: Podman, tmp_path: Path):
    """It has the host's network, and podman would take the host's name with it."""
    podman(image())
    added = containers.raylet_environment(tmp_path / "hooks", tmp_path, IMAGE, 1024**3, 64)[
        "HITL_PODMAN_RUN"
    ].split()
    assert "--hostname=sandbox" in added
    assert "--add-host=sandbox:127.0.0.1" in added
