"""From a call that waits to the device of a person who may decide, through the service as it runs."""

import asyncio
from pathlib import Path

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel
from claude_hitl_template.domain.people import SERVICE, Role
from claude_hitl_template.testing.local_service import serve_in_process
from claude_hitl_template.testing.signed_in import SignedIn
from tests.inbox import Desk
from tests.push_service import Device, checked_claims


async def test_a_call_that_waits_is_pushed_to_who_may_decide_without_its_input(tmp_path: Path) -> None:
    async with (
        Device().listening() as device,
        serve_in_process(
            tmp_path,
            keys={"first": "key-of-the-tests"},
            driving=False,
            backing="memory",
            webhook_private_hosts=device.host,
        ) as service,
    ):
        [key] = await service.store.list_keys()
        ann = SignedIn().add("ann", {key.id: (Role.APPROVER,)}).principal
        await service.store.add_principal(ann, by=SERVICE)
        channel = Channel(
            id="chan_1",
            kind="web_push",
            workspace_id=EVERY_WORKSPACE,
            principal_id=ann.id,
            created_at=utcnow(),
        )
        await service.store.add_channel(channel, device.subscription)
        desk = Desk(service.store, SignedIn(), (key.id, key.id))
        approval = await desk.ask(given={"command": "echo secret-input"}, title="secret-title")
        await asyncio.wait_for(device.came.wait(), 20)
        pushed = device.read()
        assert (pushed["approval"], pushed["kind"]) == (approval.id, "approval.requested")
        assert "secret" not in str(pushed)
        token, public = (part.partition("=")[2] for part in device.header("authorization")[6:].split(","))
        assert checked_claims(token, public)["aud"] == device.origin
