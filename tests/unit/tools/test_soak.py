"""The slopes of a soak, from made-up measurements."""

import sqlite3
from pathlib import Path

from rich.console import Console

from tools import soak
from tools.soak import Work


def test_growth_is_divided_by_what_was_done_and_a_part_that_was_not_used_has_no_slope() -> None:
    work = Work(owners=0, sessions=4, turns=10, hours=0.5)
    found = soak.slopes({"rows": 100.0, "files": 3.0}, {"rows": 140.0, "files": 3.0}, work)
    assert found["rows"] == {"before": 100, "after": 140, "session": 10, "turn": 4, "hour": 80}
    assert found["files"] == {"before": 3, "after": 3, "session": 0, "turn": 0, "hour": 0}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(soak.table(found, work))
    assert "4 sessions" in shown.get()
    assert "10.00" in shown.get()


def test_the_rows_of_every_table_are_counted(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "store.db") as database:
        database.execute("create table sessions (id)")
        database.execute("insert into sessions values (1), (2)")
    database.close()
    assert soak.rows_of(tmp_path / "store.db") == {"sessions": 2}
