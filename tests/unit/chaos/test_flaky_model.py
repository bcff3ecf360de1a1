"""The model of a chaos run answers like the offline model, except for the failures that the run requests."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.chaos.flaky_model import CUT, KEY, MISFORTUNES, SILENT, STATUSES, UnluckyModel, verify
from tests.serving import model_app, serving

ASKED = {
    "model": "x",
    "max_tokens": 100,
    "stream": True,
    "messages": [
        {"role": "user", "content": "```scenario\n[{text: '[offline model] A long enough text.'}]\n```"}
    ],
}


@pytest.fixture
def met() -> list[str]:
    return []


@pytest.fixture
async def model(met: list[str]) -> AsyncIterator[tuple[UnluckyModel, httpx.AsyncClient]]:
    one = UnluckyModel(met.append)
    async with (
        serving(model_app(one, verify)) as url,
        httpx.AsyncClient(base_url=url, headers={"x-api-key": KEY}, timeout=10) as client,
    ):
        yield one, client


async def test_without_bad_luck_it_answers(model: tuple[UnluckyModel, httpx.AsyncClient], met: list[str]):
    answer = await model[1].post("/v1/messages", json=ASKED)
    assert answer.status_code == 200
    assert "message_stop" in answer.text
    assert met == []


@pytest.mark.parametrize("misfortune", MISFORTUNES)
async def test_it_fails_once_and_says_what_was_met(
    model: tuple[UnluckyModel, httpx.AsyncClient], met: list[str], misfortune: str
):
    one, client = model
    one.fail(misfortune, 1)
    if misfortune in STATUSES:
        answer = await client.post("/v1/messages", json=ASKED)
        assert answer.status_code == STATUSES[misfortune][0]
        assert answer.json()["error"]["type"] == STATUSES[misfortune][1]
    elif misfortune == SILENT:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/messages", json=ASKED, timeout=0.5)
    elif misfortune == CUT:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/messages", json=ASKED)
    else:
        answer = await client.post("/v1/messages", json=ASKED)
        assert "not json" in answer.text
        assert "message_stop" not in answer.text
    assert met == [misfortune]
    assert "message_stop" in (await client.post("/v1/messages", json=ASKED)).text


async def test_most_requests_are_answered_however_often_it_is_to_fail(
    model: tuple[UnluckyModel, httpx.AsyncClient], met: list[str]
):
    one, client = model
    for _ in range(12):
        one.fail("answers 500", 1)
        await client.post("/v1/messages", json=ASKED)
    assert met == ["answers 500"] * 3
