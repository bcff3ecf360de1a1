"""The courier: no channel delays another, no sender's defect stops it, and neither an input nor a secret is logged."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.domain.notices import Channel, ChannelKind, Parcel
from claude_hitl_template.notify.courier import Courier, link_to
from claude_hitl_template.notify.sender import Gone, Outcome, Refused, Retry, Sender, Sent
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.sealing import Sealer
from claude_hitl_template.testing.clock import FakeClock
from claude_hitl_template.testing.memory_backend import MemoryBackend

CANARY = "s3cret-canary"
URL = "https://hitl.example.org/claude-hitl"


class Answers:
    """A sender that answers with the given outcomes in turn, or raises them; it waits for `go` first."""

    def __init__(self, *outcomes: Outcome | Exception) -> None:
        self.outcomes, self.links = list(outcomes), list[str]()
        self.go = asyncio.Event()
        self.go.set()

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        await self.go.wait()
        self.links.append(link)
        outcome = self.outcomes.pop(0) if self.outcomes else Sent()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None: ...


class Scene:
    def __init__(self, senders: Mapping[ChannelKind, Sender], **options: float) -> None:
        self.clock = FakeClock(datetime(2030, 1, 1, tzinfo=UTC))
        self.backend = MemoryBackend()
        self.store = CoreStore(self.backend, self.clock)
        self.courier = Courier(self.store, senders, pages_url=URL, jitter=lambda _low, high: high, **options)

    async def channel(self, kind: ChannelKind = "webhook", **more: Any) -> Channel:
        made = Channel(
            id=f"chan_{kind}",
            kind=kind,
            workspace_id="team",
            kinds=("session.created",),
            created_at=self.clock(),
            **more,
        )
        return await self.store.add_channel(made, {"signing": CANARY})

    async def session(self) -> str:
        made = await self.store.create_session(
            "team", agent=Agent(), environment=Environment(), title=CANARY, metadata={}, initial=[]
        )
        return made.id

    async def send(self) -> list[tuple[str, str | None]]:
        """Sends what is due; the state and the error of each delivery, the newest first."""
        await self.courier.send_due()
        await self.courier.settled()
        page = await self.store.list_deliveries(None, limit=100)
        return [(one.state, one.last_error) for one in page.data]


async def test_each_outcome_is_recorded_and_a_retry_waits_longer_each_time():
    sender = Answers(Retry("HTTP 500"), Retry("HTTP 503", after_s=7000), Sent())
    scene = Scene({"webhook": sender})
    await scene.channel()
    session_id = await scene.session()
    waits: list[float] = []
    for _ in range(2):
        await scene.send()
        [one] = (await scene.store.list_deliveries(None, limit=1)).data
        waits.append((one.next_at - scene.clock()).total_seconds())
        scene.clock.now = one.next_at
    assert waits == [5 * 1.25, 7000]
    assert await scene.send() == [("sent", None)]
    assert sender.links == [f"{URL}/sessions/{session_id}"] * 3


@pytest.mark.parametrize(
    ("outcome", "state"), [(Refused("no"), "refused"), (Gone("410"), "gone")], ids=["refused", "gone"]
)
async def test_what_will_not_work_is_not_tried_again(outcome: Outcome, state: str):
    sender = Answers(outcome)
    scene = Scene({"webhook": sender})
    await scene.channel()
    await scene.session()
    assert [found for found, _ in await scene.send()] == [state]
    scene.clock.move(3600)
    await scene.send()
    assert len(sender.links) == 1


async def test_a_channel_that_hangs_delays_no_other():
    hangs, works = Answers(), Answers()
    hangs.go.clear()
    scene = Scene({"webhook": hangs, "slack": works})
    await scene.channel()
    await scene.channel("slack")
    for _ in range(5):
        await scene.session()
    while await scene.courier.send_due():
        await asyncio.sleep(0)
    while len(works.links) < 5:
        await scene.courier.send_due(0.01)
    assert not hangs.links
    hangs.go.set()
    await scene.courier.settled()
    while await scene.courier.send_due():
        await scene.courier.settled()
    assert len(hangs.links) == 5


async def test_a_senders_defect_is_logged_by_its_place_and_tried_again():
    scene = Scene({"webhook": Answers(ValueError(f"cannot parse {CANARY}"))})
    await scene.channel()
    await scene.session()
    with capture_logs() as logged:
        [(state, why)] = await scene.send()
    assert (state, why) == ("pending", "the sender failed (ValueError); the service's log says where")
    [line] = [entry for entry in logged if entry["event"] == "a sender failed"]
    assert "test_courier.py:" in line["where"]
    assert CANARY not in str(logged)


async def test_a_sender_that_does_not_return_is_cancelled():
    hangs = Answers()
    hangs.go.clear()
    scene = Scene({"webhook": hangs}, send_s=0.01)
    await scene.channel()
    await scene.session()
    assert await scene.send() == [("pending", "no answer within 0.01 s")]


async def test_a_channel_that_is_not_set_up_or_whose_secret_is_lost_is_refused_with_the_fix():
    scene = Scene({"webhook": Answers()})
    await scene.channel("email")
    await scene.session()
    [(state, why)] = await scene.send()
    assert (state, "docs/notifications.md" in (why or "")) == ("refused", True)
    await scene.store.remove_channel("chan_email", None)
    await scene.channel()
    await scene.session()
    scene.store = CoreStore(scene.backend, scene.clock, sealer=Sealer.generate())
    scene.courier = Courier(scene.store, {"webhook": Answers()}, pages_url=URL)
    [(state, why)] = await scene.send()
    assert (state, "set the channel's secret again" in (why or "")) == ("refused", True)


async def test_it_sends_by_itself_and_wakes_for_what_is_committed():
    sender = Answers()
    scene = Scene({"webhook": sender})
    await scene.channel()
    scene.courier.start()
    await asyncio.sleep(0)  # it waits now
    await scene.session()
    async with asyncio.timeout(5):
        while not sender.links:
            await asyncio.sleep(0.01)
    scene.courier.check_health()
    await scene.courier.close()


def test_a_notice_without_an_approval_or_a_session_leads_to_the_inbox():
    scene_at = datetime(2030, 1, 1, tzinfo=UTC)
    channel = Channel(id="c", kind="webhook", workspace_id="w", created_at=scene_at)
    notice: dict[str, Any] = {
        "id": "n",
        "kind": "test",
        "workspace_id": "w",
        "created_at": scene_at,
        "title": "t",
    }
    given = {"delivery_ids": ("d",), "attempt": 1, "channel": channel}
    assert link_to(URL, Parcel.model_validate({**given, "notice": notice})) == f"{URL}/inbox"
    about = {**notice, "approval_id": "appr_1", "session_id": "sesn_1"}
    assert link_to(URL, Parcel.model_validate({**given, "notice": about})) == f"{URL}/inbox/a/appr_1"
