"""compose.yaml: the parts of the Compose specification that it uses, and what makes it safe. No engine is needed."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from claude_hitl_template.config.settings import Settings

ROOT = Path(__file__).parents[2]
Size = Annotated[str, Field(pattern=r"^\d+[kmg]b$")]
Duration = Annotated[str, Field(pattern=r"^\d+s$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Build(Part):
    context: Literal["."]
    dockerfile: str


class Healthcheck(Part):
    test: list[str]
    interval: Duration
    timeout: Duration
    retries: int


class DependsOn(Part):
    condition: Literal["service_healthy"]


class Container(Part):
    build: Build | None = None
    image: str | None = None
    init: bool = False
    restart: Literal["unless-stopped"]
    depends_on: dict[str, DependsOn] = {}
    environment: dict[str, str]
    secrets: list[str]
    volumes: list[str]
    ports: list[Annotated[str, Field(pattern=r"^127\.0\.0\.1:\d+:\d+$")]] = []
    shm_size: Size
    stop_grace_period: Duration | None = None
    cap_drop: list[Literal["ALL"]] = []
    security_opt: list[str] = []
    healthcheck: Healthcheck | None = None


class SecretFile(Part):
    file: Annotated[str, Field(pattern=r"^secrets/\w+$")]


class Compose(Part):
    name: str
    services: dict[str, Container]
    secrets: dict[str, SecretFile]
    volumes: dict[str, None]


@pytest.fixture(scope="module")
def compose() -> Compose:
    return Compose.model_validate(yaml.safe_load((ROOT / "compose.yaml").read_text()))


def test_what_a_container_names_is_declared(compose: Compose) -> None:
    for one in compose.services.values():
        assert (one.build is None) != (one.image is None)
        assert set(one.secrets) <= set(compose.secrets)
        assert {volume.partition(":")[0] for volume in one.volumes} <= set(compose.volumes)
        assert all(compose.services[other].healthcheck for other in one.depends_on)


def test_secrets_are_files_that_git_and_the_build_ignore_and_are_in_no_variable(compose: Compose) -> None:
    values = [value for one in compose.services.values() for value in one.environment.values()]
    assert not [value for value in values if "://" in value or "$" in value]
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_container_runs_without_capabilities_as_a_user_that_is_not_root(compose: Compose) -> None:
    service = compose.services["service"]
    assert service.cap_drop == ["ALL"]
    assert "no-new-privileges=true" in service.security_opt
    assert re.search(r"^USER hitl$", (ROOT / "Dockerfile.service").read_text(), re.MULTILINE)


def test_the_image_is_built_from_what_the_context_sends() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / path).exists() for path in sent)
    assert {
        "requirements.lock",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "claude_hitl_template",
    } <= set(sent)


def test_secrets_are_read_from_files_and_an_empty_one_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "ANTHROPIC_API_KEY", "HITL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HITL_HOME", str(tmp_path))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "database_url").write_text("postgresql://hitl:x@db/hitl\n")
    (tmp_path / "hitl_api_key").write_text("of-a-file")
    (tmp_path / "anthropic_api_key").touch()
    settings = Settings.load()
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == "postgresql://hitl:x@db/hitl"
    assert settings.api_key is not None
    assert settings.anthropic_api_key is None
    monkeypatch.setenv("HITL_API_KEY", "of-the-environment")
    settings = Settings.load()
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "of-the-environment"
