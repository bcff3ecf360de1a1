"""The page of what a turn changed shows as much as a browser can, and says what it leaves out."""

from claude_hitl_template.inbox import changes
from tests.inbox import browser, desk, shown_changes


async def test_a_page_of_changes_is_limited_and_says_what_it_leaves_out() -> None:
    async with desk() as on, browser(on) as client:
        session = await on.session()
        await on.begin_turn(session)
        lines = "line\n" * (changes.MAX_ROWS - 1)
        files = {
            "binary": "a\0b",
            "large": "x" * (changes.MAX_FILE_BYTES + 1),
            "list 1": lines,
            "list 2": lines,
        }
        await on.save(session, {**files, "many": "\n" * 60_000, "small": "x\n"})
        found = await shown_changes(client, session)
        assert "Not text." in found["binary"]
        assert "Too large to be shown: more than 64.0 KiB." in found["large"]
        assert f"{changes.MAX_ROWS - 1} added" in found["list 1"]
        assert found["list 2"] == "list 2 new file Show this change by itself Download"
        assert "by itself" in found["many"]
        assert "1 added" in found["small"]
        alone = await shown_changes(client, session, "many")
        assert "60000 added, 0 removed These are the first 2,000 lines of the diff." in alone["many"]
        assert (await client.get(f"sessions/{session.id}/changes?path=none")).status_code == 404
        await on.save(session, {f"{n:03}": "" for n in range(changes.MAX_FILES + 7)})
        assert len(await shown_changes(client, session)) == changes.MAX_FILES
        assert "7 more files changed" in (await client.get(f"sessions/{session.id}/changes")).text
