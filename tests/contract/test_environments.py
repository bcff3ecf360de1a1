"""Environments over REST: a session's environment is chosen at creation, and an image's facts are shown."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types.beta import BetaEnvironment

from claude_hitl_template.domain.models import Environment, ImageFacts
from claude_hitl_template.testing.threaded import serve_in_thread
from tests.contract.test_anthropic_sdk import Client, strictly

WORKER, MISSING = "registry.example/worker:1", "registry.example/missing:1"
MANIFEST: dict[str, Any] = {
    "version": "0.1.0",
    "commit": "c0ffee",
    "python": ["requests==2.32"],
    "npm": [],
    "system": ["jq"],
    "plugins": [
        {"name": "lint", "marketplace": "tools", "commit": "ab12", "path": "/app/plugins/tools/plugins/lint"}
    ],
    "base": "rayproject/ray:2.60.0-py312",
    "ray": "2.60.0",
    "python_version": "3.12",
}
PLACES = {
    "default": Environment(image=WORKER),
    "local": Environment(id="local"),
    "missing": Environment(id="missing", image=MISSING),
}
FACTS = ImageFacts(
    reference=WORKER,
    digest="sha256:0123",
    version="0.1.0",
    commit="c0ffee",
    ray="2.60.0",
    python="3.12",
    manifest=MANIFEST,
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("environments")
    with serve_in_thread(
        folder, keys={"alice": "secret"}, backing="memory", environments=PLACES, images={WORKER: FACTS}
    ) as served:
        made = Client(served)
        yield made
        made.close()


def test_all_environments_are_listed_and_the_sdk_understands_each(client: Client):
    beta = client.sdk.beta
    assert [e.id for e in beta.environments.list(limit=5)] == ["default", "local", "missing"]
    for id_ in PLACES:
        assert beta.environments.retrieve(id_).id == id_
        strictly(BetaEnvironment, client.http.get(f"/v1/environments/{id_}").json())


def test_an_environment_that_the_service_runs_is_no_self_hosted_one(client: Client):
    """In a self_hosted one the client would run the tools, with its own worker."""
    for environment in client.sdk.beta.environments.list():
        config = environment.config
        assert config.type == "cloud"
        assert not any(config.packages.model_dump(exclude={"type"}).values())


def test_an_image_says_what_is_in_it(client: Client):
    shown = client.http.get("/v1/environments/default").json()
    assert (shown["image"], shown["image_digest"]) == (WORKER, "sha256:0123")
    assert shown["image_facts"] == {"version": "0.1.0", "commit": "c0ffee", "ray": "2.60.0", "python": "3.12"}
    assert shown["dependencies"] == MANIFEST
    listed = client.http.get("/v1/environments").json()["data"]
    assert listed[0] == shown


@pytest.mark.parametrize(("id_", "image"), [("local", None), ("missing", MISSING)])
def test_where_nothing_is_known_of_an_image_nothing_is_said(client: Client, id_: str, image: str | None):
    shown = client.http.get(f"/v1/environments/{id_}").json()
    assert shown["image"] == image
    assert (shown["image_digest"], shown["image_facts"], shown["dependencies"]) == (None, None, None)


def test_a_session_runs_in_the_environment_that_it_names(client: Client):
    for id_ in PLACES:
        session_id = client.create(environment_id=id_)
        assert client.sessions.retrieve(session_id).environment_id == id_


@pytest.mark.parametrize("id_", ["other", "", "DEFAULT", "../default", "default\n"])
def test_an_unknown_environment_is_named_with_its_field(client: Client, id_: str):
    with pytest.raises(anthropic.NotFoundError) as refused:
        client.create(environment_id=id_)
    assert refused.value.body["error"]["message"].startswith("environment_id: there is no environment")
    assert "default, local, missing" in refused.value.body["error"]["message"]
