"""Fault points of a running service: a fault can be planned for the next hit of one, and each hit is reported once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.chaos.points import Points


def service(folder: Path, counts: dict[str, int], hits: Sequence[Mapping[str, object]]) -> None:
    (folder / "counts.json").write_text(json.dumps(counts))
    with (folder / "hits.jsonl").open("a") as file:
        file.writelines(json.dumps(hit) + "\n" for hit in hits)


def test_nothing_is_planned_for_a_service_that_has_reached_nothing(tmp_path: Path):
    assert Points(tmp_path / "faults").plan(0.5, "kill") is None


def test_the_next_hit_of_a_point_that_was_reached_is_planned_beside_what_is_planned_already(tmp_path: Path):
    points = Points(tmp_path / "faults")
    service(tmp_path / "faults", {"claim.after_commit": 7, "spawn.before": 1}, [])
    assert points.plan(0.0, "kill") == "claim.after_commit"
    assert points.plan(0.99, "delay 2") == "spawn.before"
    planned = json.loads((tmp_path / "faults" / "plan.json").read_text())
    assert planned == {"claim.after_commit": {"8": "kill"}, "spawn.before": {"2": "delay 2"}}
    points.clear()
    assert json.loads((tmp_path / "faults" / "plan.json").read_text()) == {}


def test_what_was_done_is_told_once(tmp_path: Path):
    points = Points(tmp_path / "faults")
    assert points.hits() == []
    quiet, struck = (
        {"point": "own.before", "hit": n, "pid": 1, "did": did, "at": 1893456000.0}
        for n, did in [(1, ""), (2, "kill")]
    )
    service(tmp_path / "faults", {"own.before": 2}, [quiet, struck])
    [hit] = points.hits()
    assert (hit.point, hit.did, hit.at.year) == ("own.before", "kill", 2030)
    assert points.hits() == []
    with (tmp_path / "faults" / "hits.jsonl").open("a") as file:
        file.write(json.dumps(struck))  # its end is not written yet
    assert points.hits() == []
