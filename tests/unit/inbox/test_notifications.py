"""The page of one's own notifications: devices are registered, changed and removed by their own person only."""

import re
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from claude_hitl_template.domain.notices import Channel
from claude_hitl_template.domain.people import Role
from claude_hitl_template.testing.signed_in import CSRF
from tests.inbox import Desk, browser, desk

KEYS = {
    "p256dh": "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
    "auth": "BTBZMqHH6r4Tts7J_aSIgg",
}
PHONE = "Mozilla/5.0 (Linux; Android 15) Chrome/140.0 Mobile Safari/537.36"


@pytest_asyncio.fixture
async def on() -> AsyncIterator[Desk]:
    async with desk() as made:
        yield made


def subscription(number: int = 1, **more: str) -> dict[str, str]:
    return {"endpoint": f"https://push.example/p/{number}", **KEYS, "csrf": CSRF, **more}


async def turn_on(client: httpx.AsyncClient, **about: str) -> httpx.Response:
    return await client.post(
        "inbox/notifications/devices", data=subscription(**about), headers={"user-agent": PHONE}
    )


async def channels(on: Desk, person: str) -> list[Channel]:
    return await on.store.list_channels(None, principal_id=f"user_{person}")


async def test_a_device_is_turned_on_once_set_and_removed(on: Desk) -> None:
    async with browser(on) as client:
        assert (await client.get("inbox/notifications/device")).json()["csrf"] == CSRF
        for _ in range(2):
            assert (await turn_on(client)).status_code == 204
        [device] = await channels(on, "ann")
        assert await on.store.channel_secret(device.id) == {
            name: value for name, value in subscription().items() if name != "csrf"
        }
        page = (await client.get("inbox/notifications")).text
        assert "Chrome on Android" in page
        assert f'data-device="{device.settings["device"]}"' in page
        assert "push.example" not in page, "the address is a secret"
        given = {"csrf": CSRF, "do": "save", "enabled": "on", "min_severity": "high", "digest": "900"}
        quiet = {"quiet_start": "22:00", "quiet_end": "07:00", "time_zone": "Europe/Berlin"}
        saved = await client.post(f"inbox/notifications/{device.id}", data={**given, **quiet})
        assert saved.status_code == 303
        [changed] = await channels(on, "ann")
        assert (changed.min_severity, changed.digest_s, changed.enabled) == ("high", 900, True)
        assert changed.quiet_hours is not None
        assert changed.quiet_hours.model_dump() == {
            "start": "22:00", "end": "07:00", "time_zone": "Europe/Berlin"
        }  # fmt: skip
        tested = await client.post(
            f"inbox/notifications/{device.id}", data={"csrf": CSRF, "do": "test", "nonce": "n1"}
        )
        assert tested.status_code == 303
        [delivery] = (await on.store.list_deliveries(None, limit=9)).data
        assert (delivery.notice.kind, delivery.channel_id) == ("test", device.id)
        removed = await client.post(f"inbox/notifications/{device.id}", data={"csrf": CSRF, "do": "remove"})
        assert removed.status_code == 303
        assert await channels(on, "ann") == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quiet_start": "22:00"}, "need a start and an end"),
        ({"quiet_start": "25:00", "quiet_end": "07:00"}, "hour must be in"),
        ({"quiet_start": "22:00", "quiet_end": "07:00", "time_zone": "Moon/Sea"}, "not a time zone"),
        ({"min_severity": "mild"}, "Input should be"),
    ],
)
async def test_a_wrong_setting_is_said_on_the_form_and_changes_nothing(
    on: Desk, given: dict[str, str], said: str
) -> None:
    async with browser(on) as client:
        await turn_on(client)
        [device] = await channels(on, "ann")
        form = {"csrf": CSRF, "do": "save", "min_severity": "low", "time_zone": "UTC", **given}
        answer = await client.post(f"inbox/notifications/{device.id}", data=form)
        assert answer.status_code == 400
        assert re.search(rf'<p class="error" role="alert">[^<]*{said}', answer.text)
        assert await channels(on, "ann") == [device]


async def test_a_renewed_subscription_takes_the_place_and_the_settings_of_the_old_one(on: Desk) -> None:
    async with browser(on) as client:
        await turn_on(client)
        [old] = await channels(on, "ann")
        await on.store.change_channel(old.id, None, {"min_severity": "high"})
        old_address = subscription()["endpoint"]
        await client.post("inbox/notifications/devices", data=subscription(2, replaces=old_address))
        [renewed] = await channels(on, "ann")
        assert renewed.id != old.id
        assert (renewed.name, renewed.min_severity) == (old.name, "high")


async def test_a_device_belongs_to_the_person_who_turned_it_on_last(on: Desk) -> None:
    for person in ("ann", "vic"):
        async with browser(on, person) as client:
            await turn_on(client)
    assert await channels(on, "ann") == []
    assert len(await channels(on, "vic")) == 1


async def test_a_mail_address_and_another_service_are_added_and_the_url_is_shown_to_no_one(on: Desk) -> None:
    add = "inbox/notifications/channels"
    url = "tgram://123456789:abcdefg_hijklmnop/12315544/"
    async with browser(on) as client:
        for kind, target in (("email", "ann@example.org"), ("apprise", url)):
            answer = await client.post(add, data={"csrf": CSRF, "kind": kind, "target": target})
            assert answer.status_code == 303
        mail, service = await channels(on, "ann")
        assert (mail.kind, mail.settings) == ("email", {"address": "ann@example.org"})
        assert (service.kind, service.name, service.settings) == ("apprise", "Telegram", {})
        assert await on.store.channel_secret(service.id) == {"url": url}
        assert "abcdefg" not in (await client.get("inbox/notifications")).text
        for kind, target, said in (
            ("email", "ann@", "must be a mail address"),
            ("apprise", "jsons://10.0.0.1/s3cret", "private network"),
        ):
            answer = await client.post(add, data={"csrf": CSRF, "kind": kind, "target": target})
            assert answer.status_code == 400
            assert re.search(rf'<p class="error" role="alert">[^<]*{said}', answer.text)
            assert "s3cret" not in answer.text
        assert len(await channels(on, "ann")) == 2


async def test_who_manages_a_workspace_adds_a_channel_of_slack_to_it_and_others_do_not_see_it(
    on: Desk,
) -> None:
    on.signed_in.add("ops", {on.workspaces[0]: (Role.OPERATOR,)})
    add, token = "inbox/notifications/channels", "xoxb-12345-s3cret"
    form = {
        "csrf": CSRF,
        "kind": "slack",
        "workspace": on.workspaces[0],
        "target": "C0123456789",
        "token": token,
    }
    async with browser(on, "ops") as client:
        assert (await client.post(add, data=form)).status_code == 303
        [channel] = await on.store.list_channels(on.workspaces[0])
        assert (channel.kind, channel.principal_id, channel.settings) == (
            "slack",
            None,
            {"channel": "C0123456789", "show_input": False},
        )
        assert "approval.decided" in channel.kinds
        assert await on.store.channel_secret(channel.id) == {"bot_token": token}
        signing = "5ecre7" * 5
        for field, wrong, said in (
            ("target", "#general", "channel&#39;s id"),
            ("token", "secret", "xoxb-"),
            ("signing_secret", "a b", "Basic Information"),
            ("signing_secret", signing, "let the channel show the calls"),
        ):
            answer = await client.post(add, data={**form, field: wrong})
            assert answer.status_code == 400
            assert re.search(rf'<p class="error" role="alert">[^<]*{said}', answer.text)
        shows = {**form, "show_input": "on", "signing_secret": signing}
        assert (await client.post(add, data=shows)).status_code == 303
        [_, second] = await on.store.list_channels(on.workspaces[0])
        assert second.settings["show_input"] is True
        assert await on.store.channel_secret(second.id) == {"bot_token": token, "signing_secret": signing}
        elsewhere = await client.post(add, data={**form, "workspace": on.workspaces[1]})
        assert elsewhere.status_code == 404
        page = (await client.get("inbox/notifications")).text
        assert "C0123456789" in page
        assert "s3cret" not in page
        assert signing not in page
        assert "/claude-hitl/slack/interactions" in page
        remove = {"csrf": CSRF, "do": "remove"}
        assert (await client.post(f"inbox/notifications/{second.id}", data=remove)).status_code == 303
    async with browser(on) as client:
        assert (await client.post(add, data=form)).status_code == 403
        assert "C0123456789" not in (await client.get("inbox/notifications")).text
        assert (await client.post(f"inbox/notifications/{channel.id}", data=remove)).status_code == 404
    async with browser(on, "ops") as client:
        assert (await client.post(f"inbox/notifications/{channel.id}", data=remove)).status_code == 303
    assert await on.store.list_channels(on.workspaces[0]) == []


async def test_another_persons_channel_does_not_exist_and_a_stranger_or_a_foreign_page_does_nothing(
    on: Desk,
) -> None:
    async with browser(on) as client:
        await turn_on(client)
        wrong = await client.post("inbox/notifications/devices", data=subscription(2, csrf="wrong"))
        assert wrong.status_code == 403
        bad = await client.post("inbox/notifications/devices", data=subscription(2, auth="short"))
        assert bad.status_code == 400
        assert "auth" in bad.text
        private = await client.post(
            "inbox/notifications/devices", data=subscription(2, endpoint="https://169.254.169.254/p")
        )
        assert private.status_code == 400
    [device] = await channels(on, "ann")
    address, remove = f"inbox/notifications/{device.id}", {"csrf": CSRF, "do": "remove"}
    async with browser(on, "eve") as client:
        assert (await client.post(address, data=remove)).status_code == 404
        assert "Chrome on Android" not in (await client.get("inbox/notifications")).text
    async with browser(on, "a stranger") as client:
        for path in ("inbox/notifications", "inbox/notifications/device"):
            assert (await client.get(path)).status_code == 403
        assert (await client.post(address, data=remove)).status_code == 403
    assert await channels(on, "ann") == [device]
