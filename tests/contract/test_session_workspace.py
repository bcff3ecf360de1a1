"""A session's files outlast its process and its folder: over the real CLI and the offline model, without Ray."""

import asyncio
import contextlib
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.errors import StaleOwner
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.session.runner import Limits
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.workspace.sync import WorkspaceLocation
from tests.contract.test_session import KEY, House, driven, house, kill, model_url, user
from tests.integration.harness import script

assert model_url  # a fixture, for the tests here too

UNASKED = Floor(default="always_allow")
ALLOWED = PermissionPolicy(default="always_allow", rules=(Rule(rule="Bash(cat:*)", policy="always_ask"),))


def wipe(h: House) -> None:
    """As in a new container, or on another machine."""
    shutil.rmtree(h.workspace)
    h.place.marker.unlink(missing_ok=True)


async def saved(h: House) -> list[str]:
    return [f.path for f in (await h.store.list_workspace(h.session.id, KEY, limit=100)).data]


async def decide(h: House) -> None:
    stop = await h.until_idle()
    assert stop["type"] == "requires_action"
    for event_id in stop["event_ids"]:
        await h.confirm(event_id)


async def results(h: House) -> str:
    return str([e.payload["content"] for e in await h.log("agent.tool_result")])


async def errors(h: House) -> list[str]:
    return [e.payload["error"]["message"] for e in await h.log("session.error")]


async def test_a_file_written_before_parking_is_there_after_resuming_with_the_folder_wiped(
    tmp_path: Path, model_url: str
):
    prompt = script("mkdir -p sub; echo kept > sub/note.txt; chmod 755 sub/note.txt", "cat sub/note.txt")
    h = await house(tmp_path, model_url, prompt, policy=ALLOWED, floor=UNASKED)
    await h.drive()
    assert (await h.store.get_session(h.session.id)).parked
    wipe(h)
    await decide(h)
    await h.drive()
    assert "kept" in await results(h)
    assert (h.workspace / "sub/note.txt").stat().st_mode & 0o777 == 0o755


async def test_what_a_turn_wrote_is_saved_before_its_end_is_seen(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, script("echo x > made.txt"), policy=ALLOWED, floor=UNASKED)
    h.limits = Limits(hot_window_s=0, idle_timeout_s=60)
    driving = asyncio.create_task(h.drive())
    assert (await h.until_idle())["type"] == "end_turn"
    assert await saved(h) == ["made.txt"]
    await h.store.archive_session(h.session.id, KEY)
    with pytest.raises(StaleOwner):
        await driving


@pytest.mark.takes_long("two owners, one after the other, each with the real CLI")
async def test_an_owner_that_is_killed_in_mid_turn_loses_at_most_what_the_last_call_wrote(
    tmp_path: Path, model_url: str
):
    # The model may issue the second call again, if the owner dies before the store has it; then it does not wait.
    only_once = f"mkdir {tmp_path}/once && sleep 60"
    prompt = script("echo first > first.txt", f"echo second > second.txt; {only_once}")
    h = await house(tmp_path, model_url, prompt, policy=ALLOWED, floor=UNASKED)
    driving = asyncio.create_task(h.drive())
    while not (h.workspace / "second.txt").exists() or not await saved(h):
        await asyncio.sleep(0.05)
    driving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await driving
    wipe(h)
    await h.drive()
    assert (h.workspace / "first.txt").read_text() == "first\n"


async def test_a_cli_that_is_killed_loses_nothing_of_the_folder(tmp_path: Path, model_url: str):
    prompt = script("echo first > first.txt; sleep 60")
    h = await house(tmp_path, model_url, prompt, policy=ALLOWED, floor=UNASKED)
    driving = asyncio.create_task(h.drive())
    while not (h.workspace / "first.txt").exists():
        await asyncio.sleep(0.05)
    await kill(h, driving)
    assert await saved(h) == ["first.txt"]


class Counted:
    """A store that notes what it is asked."""

    def __init__(self, store: CoreStore) -> None:
        self._store, self.calls = store, list[str]()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return await method(*args, **kwargs)

        return call


async def test_a_turn_of_text_in_an_unchanged_folder_asks_nothing_of_the_store_for_it(
    tmp_path: Path, model_url: str
):
    h = await house(tmp_path, model_url, script("echo x > made.txt"), policy=ALLOWED, floor=UNASKED)
    await h.drive()
    counted = Counted(h.store)
    h.store = cast(CoreStore, counted)
    await h.send(user("Say hello"))
    await h.drive()
    assert "end_turn" in counted.calls
    assert not [name for name in counted.calls if "blobs" in name or "workspace" in name]


async def cramped_house(tmp_path: Path, model_url: str, prompt: str) -> tuple[House, Path]:
    """A house whose file area cannot be written, until the file that is in its place is removed."""
    blocking = tmp_path / "files"
    blocking.write_text("in the folder's place")
    store = CoreStore(MemoryBackend(), files=FileArea(blocking.as_uri()))
    session = await store.create_session(
        KEY,
        agent=Agent(policy=ALLOWED),
        environment=Environment(),
        title=None,
        metadata={},
        initial=[user(prompt)],
    )
    limits = Limits(hot_window_s=0, idle_timeout_s=0)
    return House(store, session, tmp_path, model_url, limits, floor=UNASKED), blocking


async def test_a_save_that_fails_is_told_and_the_turn_goes_on_and_the_next_one_has_all(
    tmp_path: Path, model_url: str
):
    h, blocking = await cramped_house(tmp_path, model_url, script("echo x > made.txt"))
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert "Done" in await h.said()
    (told,) = await errors(h)
    assert "workspace was not saved" in told
    assert "HITL_FILES_URL" in told
    assert (await h.store.get_session(h.session.id)).parked  # the folder stays where it is
    blocking.unlink()
    await h.send(user("Say hello"))
    await h.drive()
    assert await saved(h) == ["made.txt"]
    assert len(await errors(h)) == 1


class Container(House):
    """A folder that goes with its owner."""

    @property
    def place(self) -> WorkspaceLocation:
        return WorkspaceLocation(self.workspace, self.root / "saved", lasts=False, max_bytes=10_000)


async def test_an_owner_whose_folder_would_go_with_it_stays_until_all_is_saved(
    tmp_path: Path, model_url: str
):
    made = await house(
        tmp_path,
        model_url,
        script("echo small > small.txt; truncate -s 3G big.bin"),
        policy=ALLOWED,
        floor=UNASKED,
    )
    h = Container(made.store, made.session, made.root, made.model_url, made.limits, floor=UNASKED)
    async with driven(h):
        assert (await h.until_idle())["type"] == "end_turn"
        (told,) = await errors(h)
        assert "big.bin (3.0 GiB)" in told
        assert "keeps its process" in told
        assert not (await h.store.get_session(h.session.id)).parked
        await h.send(user(script("rm big.bin")))
    assert (await h.store.get_session(h.session.id)).parked
    assert await saved(h) == ["small.txt"]
    assert (await h.until_idle())["type"] == "end_turn"


async def test_what_cannot_be_restored_ends_the_turn_with_what_to_mend_and_is_kept(
    tmp_path: Path, model_url: str
):
    h = await house(tmp_path, model_url, script("echo x > made.txt"), policy=ALLOWED, floor=UNASKED)
    await h.drive()
    before = (await h.store.get_session(h.session.id)).workspace
    wipe(h)
    whole = h.store
    h.store = CoreStore(cast(Any, whole)._backend)  # the same database, and none of the files
    await h.send(user("Say hello"))
    await h.drive()
    assert (await h.until_idle())["type"] == "retries_exhausted"
    assert "HITL_FILES_URL" in (await errors(h))[-1]
    assert (await whole.get_session(h.session.id)).workspace == before
    h.store = whole
    await h.send(user("Go on"))
    await h.drive()
    assert (h.workspace / "made.txt").exists()
    assert (await h.until_idle())["type"] == "end_turn"
