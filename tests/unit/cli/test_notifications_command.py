"""`hitl notifications`: what was sent over which channel, how each channel does, and a notification sent again."""

import asyncio

import pytest
from typer.testing import CliRunner

from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.commands import notifications, workspaces
from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Agent, Environment, utcnow
from claude_hitl_template.domain.notices import FAILING, Channel
from claude_hitl_template.errors import HitlError
from claude_hitl_template.testing.threaded import Threaded
from tests.unit.cli.conftest import FIRST

HOOK = "https://127.0.0.1/"  # which no webhook may reach


@pytest.fixture(autouse=True)
def first_key(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line has the first key."""
    monkeypatch.setenv("HITL_API_KEY", FIRST)


def run(*arguments: str) -> str:
    """Runs `hitl notifications` and returns what it prints to stdout. Raises the command's errors."""
    result = CliRunner().invoke(app, ["notifications", *arguments])
    if isinstance(result.exception, HitlError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


async def _refuse(served: Threaded) -> str:
    """A channel whose sends fail; returns the id of a notification that was refused."""
    store = served.service.store
    identity = await store.find_identity(hash_api_key(FIRST))
    assert identity is not None
    home = identity.workspaces[0].id
    made = Channel(
        id="wbhk_1",
        kind="webhook",
        name="deploys",
        workspace_id=home,
        kinds=("session.created",),
        settings={"url": HOOK},
        created_at=utcnow(),
    )
    await store.add_channel(made, {"signing": "whsec_c2VjcmV0"})
    await store.create_session(
        home, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    delivery_id = await _refused(served, home)
    for _ in range(FAILING - 1):
        await store.redeliver(delivery_id, home)
        await _refused(served, home)
    return delivery_id


async def _refused(served: Threaded, home: str) -> str:
    """The id of the one notification, once the service's courier has recorded that it was refused."""
    while True:
        page = await served.service.store.list_deliveries(home, limit=1, states=["refused"])
        if page.data:
            return page.data[0].id
        await asyncio.sleep(0.01)


def test_what_was_sent_how_a_channel_does_and_a_notification_sent_again(served: Threaded, here: Settings):
    assert "no notifications" in run()
    assert "no channels" in run("channels")
    assert notifications.failing_channels(here) == []
    notification_id = served.run(_refuse(served))
    shown = run("--state", "refused")
    assert notification_id in shown
    assert "A session was created" in shown
    assert "webhook deploys" in shown
    assert "failing" in run("channels")
    [failing] = notifications.failing_channels(here)
    assert failing.startswith("webhook deploys (wbhk_1): ")
    assert "no notifications" in run("--state", "sent")
    assert f"{notification_id} is sent again over webhook deploys" in run("retry", notification_id)
    with pytest.raises(HitlError):
        run("retry", "dlv_none")


def test_a_key_that_opens_no_channels_raises_no_alarm(
    here: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_settings: Settings) -> str:
        return "the key of another data folder"

    monkeypatch.setattr(workspaces, "operator_key", wrong)
    assert notifications.failing_channels(here) == []
