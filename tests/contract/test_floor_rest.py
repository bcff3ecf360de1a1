"""The operator's floor, as a client with the official SDK sees it."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.contract.asking import key_of, message
from tests.contract.conftest import KEYS
from tests.contract.test_anthropic_sdk import Client

TOOLSET = {"type": "agent_toolset_20260401"}
ALLOW = {"permission_policy": {"type": "always_allow"}}
ASK = {"permission_policy": {"type": "always_ask"}}
WIKI = {"type": "url", "name": "wiki", "url": "https://wiki.example/mcp"}
WRITE = "Write hello.txt with a greeting"
LEAVING = ("bash", "write", "edit", "web_fetch", "web_search")


@pytest.fixture(scope="module")
def denying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    folder = tmp_path_factory.mktemp("denying")
    floor = Floor(rules=(Rule(rule="Write", policy="always_deny"),), default="always_allow")
    with serve_in_thread(folder, keys=KEYS, hot_window_s=0.0, idle_timeout_s=0.0, floor=floor) as served:
        yield served


def tools(**toolset: Any) -> dict[str, Any]:
    return {"tools": [{**TOOLSET, **toolset}]}


def of_wiki(**toolset: Any) -> dict[str, Any]:
    return {"mcp_servers": [WIKI], "tools": [{"type": "mcp_toolset", "mcp_server_name": "wiki", **toolset}]}


def ruled(*rules: str) -> dict[str, Any]:
    return {"permission_rules": [{"rule": rule, "policy": "always_allow"} for rule in rules]}


def create(client: Client, **overrides: Any) -> Any:
    agent: Any = {"type": "agent_with_overrides", "id": "default", **overrides}
    return client.sessions.create(agent=agent, environment_id="default")


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (tools(default_config=ALLOW), "agent.tools.0.default_config.permission_policy"),
        *(
            (tools(configs=[{"name": "read", **ALLOW}, {"name": n, **ALLOW}]), "agent.tools.0.configs.1.permission_policy")
            for n in LEAVING
        ),
        (of_wiki(default_config=ALLOW), "agent.tools.0.default_config.permission_policy"),
        (ruled("Read", "Bash"), "agent.permission_rules.1.policy"),
        (ruled("Bash(*)"), "agent.permission_rules.0.policy"),
        (ruled("Edit(./**)"), "agent.permission_rules.0.policy"),
        (ruled("Monitor"), "agent.permission_rules.0.policy"),
        ({**of_wiki(), **ruled("mcp__wiki")}, "agent.permission_rules.0.policy"),
        ({**of_wiki(), **ruled("mcp__wiki__*")}, "agent.permission_rules.0.policy"),
    ],
)  # fmt: skip
def test_what_would_run_unasked_is_refused_by_the_name_of_its_field(
    client: Client, overrides: dict[str, Any], field: str
):
    with pytest.raises(anthropic.BadRequestError) as refused:
        create(client, **overrides)
    said = str(refused.value)
    assert f"{field}: " in said
    assert "HITL_POLICY" in said


@pytest.mark.parametrize(
    "overrides",
    [
        tools(),
        tools(default_config=ASK),
        tools(configs=[{"name": name, **ALLOW} for name in ("read", "glob", "grep")]),
        tools(default_config=ALLOW, configs=[{"name": name, **ASK} for name in LEAVING]),
        tools(default_config=ALLOW, configs=[{"name": name, "enabled": False} for name in LEAVING]),
        tools(default_config={**ALLOW, "enabled": False}),
        of_wiki(configs=[{"name": "add", **ALLOW}]),
        ruled("Bash(git status:*)", "Edit(src/**)", "WebFetch(domain:example.com)", "Read"),
    ],
)
def test_what_reads_and_what_is_named_may_run_unasked(client: Client, overrides: dict[str, Any]):
    assert create(client, **overrides).id


def test_where_the_operator_permits_it_a_whole_toolset_may_run_unasked(permitting: Threaded):
    client = Client(permitting)
    made = create(client, **tools(default_config=ALLOW))
    client.sessions.events.send(made.id, events=[message(WRITE).model_dump(mode="json")])
    client.finished(made.id)
    assert client.wrote(made.id, "hello.txt")
    client.close()


async def _begun(served: Threaded) -> str:
    """Creates a session of a previous release, all of whose tools run without asking."""
    store, key = (
        served.service.store,
        key_of(await served.service.store.find_identity(hash_api_key(KEYS["alice"]))),
    )
    assert key is not None
    session = await store.create_session(
        key.id, agent=Agent(policy=PermissionPolicy(default="always_allow")), environment=Environment(),
        title=None, metadata={}, initial=[message(WRITE)],
    )  # fmt: skip
    return session.id


def test_a_session_of_before_goes_on_and_asks(parking: Threaded, client: Client):
    session_id = parking.run(_begun(parking))
    [event_id] = client.asked(session_id)
    assert not client.wrote(session_id, "hello.txt")
    client.confirm(session_id, event_id)
    client.finished(session_id)
    assert client.wrote(session_id, "hello.txt")


def test_what_the_floor_denies_does_not_run_whatever_the_agent_says(denying: Threaded):
    client = Client(denying)
    session_id = denying.run(_begun(denying))
    client.finished(session_id)
    assert not client.wrote(session_id, "hello.txt")
    assert client.sessions.retrieve(session_id).status == "idle"
    client.close()


def test_what_holds_is_told_to_who_asks_for_the_version(parking: Threaded, denying: Threaded):
    for served, said in ((parking, "built in"), (denying, "1 rule, default always_allow")):
        key = {"x-api-key": KEYS["alice"]}
        assert (
            said
            in httpx.get(f"{served.service.url}/v1/version", headers=key, trust_env=False).json()["floor"]
        )
