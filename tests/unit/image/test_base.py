"""Which image the build stands on: by digest, recorded, and said where a name may be moved."""

from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import labels, verify
from claude_hitl_template.image.build import pin_base
from claude_hitl_template.image.context import read_checkout, stage
from claude_hitl_template.image.tools import Tool

DIGEST = "sha256:" + "ab" * 32


class Storage(Tool):
    """A tool whose registry has one image."""

    def __init__(self, *here: str, digest: str | None = DIGEST) -> None:
        super().__init__("podman", "/nonexistent/podman")
        self.__dict__.update(here=list(here), digest=digest, pulled=[])

    def inspect(self, image: str) -> dict[str, Any]:
        if image not in self.__dict__["here"]:
            raise ConfigError(f"no {image}", "-")
        name, digest = image.partition(":")[0], self.__dict__["digest"]
        return {"RepoDigests": [f"{name}@{digest}"] if digest else []}

    def pull(self, image: str) -> None:
        self.__dict__["pulled"].append(image)
        self.__dict__["here"].append(image)


def test_a_name_with_a_digest_is_taken_as_it_is_and_nothing_is_said():
    said: list[str] = []
    base = f"docker.io/rayproject/ray@{DIGEST}"
    assert pin_base(Storage(), base, said.append) == base
    assert said == []


@pytest.mark.parametrize("here", [True, False])
def test_a_tag_is_pulled_if_need_be_built_on_by_its_digest_and_warned_about(here: bool):
    said: list[str] = []
    tool = Storage(*(["rayproject/ray:1"] if here else []))
    assert pin_base(tool, "rayproject/ray:1", said.append) == f"rayproject/ray@{DIGEST}"
    assert tool.__dict__["pulled"] == ([] if here else ["rayproject/ray:1"])
    assert len(said) == 1
    assert "Warning: rayproject/ray:1 has no digest" in said[0]
    assert f"rayproject/ray@{DIGEST}" in said[0]


def test_a_tag_whose_digest_is_not_known_is_built_on_and_said():
    said: list[str] = []
    assert pin_base(Storage("base:1", digest=None), "base:1", said.append) == "base:1"
    assert "cannot be told" in said[0]


def test_a_base_made_here_moves_with_no_registry():
    said: list[str] = []
    assert (
        pin_base(Storage("localhost/base:1"), "localhost/base:1", said.append) == f"localhost/base@{DIGEST}"
    )
    assert said == []


@pytest.mark.parametrize("digest", [DIGEST, None])
def test_the_image_records_it_and_verify_shows_it(checkout: Path, tmp_path: Path, digest: str | None):
    """Empty where it is not known: the base may have the label, of its own base."""
    folder = tmp_path / "context"
    folder.mkdir()
    found = stage(read_checkout(checkout), folder, base="base:1", base_digest=digest, offline=True)
    assert (found.labels[labels.BASE_NAME], found.labels[labels.BASE_DIGEST]) == ("base:1", digest or "")
    assert found.manifest["base_digest"] == digest
    [check] = [c for c in verify.label_checks({"Labels": found.labels}) if c.name == "Base image"]
    assert check.level == ("ok" if digest else "warning")
    assert "base:1" in check.found
    assert (digest or "not recorded") in check.found


def test_an_image_of_an_earlier_release_is_warned_about():
    [check] = [c for c in verify.label_checks({"Labels": {}}) if c.name == "Base image"]
    assert check.level == "warning"
