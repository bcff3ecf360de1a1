"""Channels: where notices are sent, their secrets, and what of their changes is recorded."""

from typing import Any

import pytest

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel, ChannelState
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import Conflict, NotFound
from claude_hitl_template.store.channels import CHANNELS
from claude_hitl_template.store.core import CoreStore

ANN = Actor(name="ann", principal_id="user_ann")


def channel(number: int = 1, **more: Any) -> Channel:
    given = {"kind": "webhook", "workspace_id": "team", "created_at": utcnow()}
    return Channel(id=f"chan_{number:03}", **given | more)


async def test_a_channel_is_registered_once_changed_and_removed_and_its_secret_is_kept_apart(
    store: CoreStore,
):
    made = await store.add_channel(channel(settings={"url": "https://a.example"}), {"signing": "s3cret"})
    assert await store.add_channel(channel(name="again"), {"signing": "other"}) == made
    assert await store.channel_secret(made.id) == {"signing": "s3cret"}
    failing = ChannelState(failures=9)
    changed = await store.change_channel(made.id, "team", {"name": "n", "state": failing}, by=ANN)
    assert (changed.name, changed.state) == ("n", ChannelState())
    assert await store.channel_secret(made.id) == {"signing": "s3cret"}
    await store.change_channel(made.id, None, {}, secret={"signing": "new"}, by=ANN)
    assert await store.channel_secret(made.id) == {"signing": "new"}
    await store.remove_channel(made.id, "team", by=ANN)
    for refused in (store.get_channel(made.id, "team"), store.channel_secret(made.id)):
        with pytest.raises(NotFound):
            await refused
    entries = (await store.list_audit("team", limit=10, order="asc")).data
    assert [entry.action for entry in entries] == [
        "channel.created", "channel.changed", "channel.changed", "channel.removed",
    ]  # fmt: skip
    assert [entry.details["changed"] for entry in entries[1:]] == [["name"], ["secret"], []]
    assert "s3cret" not in str([entry.wire() for entry in entries])


async def test_channels_of_another_workspace_are_not_found_and_a_persons_are_in_none(store: CoreStore):
    await store.add_channel(channel(1), {})
    await store.add_channel(channel(2, workspace_id="other"), {})
    mine = channel(3, workspace_id=EVERY_WORKSPACE, principal_id="user_ann")
    await store.add_channel(mine, {})
    assert [one.id for one in await store.list_channels("team")] == ["chan_001"]
    assert await store.list_channels(None, principal_id="user_ann") == [mine]
    assert len(await store.list_channels(None)) == 3
    with pytest.raises(NotFound):
        await store.get_channel("chan_002", "team")


async def test_a_workspace_has_a_limited_number_of_channels(store: CoreStore):
    for number in range(CHANNELS):
        await store.add_channel(channel(number), {})
    with pytest.raises(Conflict, match="remove one"):
        await store.add_channel(channel(CHANNELS), {})
    await store.add_channel(channel(CHANNELS, workspace_id="other"), {})
