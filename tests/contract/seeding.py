"""A pytest plugin that runs each test named in mutants.py with all safeguards, and without the one that it should miss.

The environment names a file for the results, as JSON: by bug and test how it ended.
"""

import json
import os
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, code_changes

RESULTS_VARIABLE = "HITL_TEST_SEEDING"
NONE = "none"
BACKEND = "memory"
_results: dict[str, dict[str, str]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.function.__name__
    bugs = [bug for bug, mutant in MUTANTS.items() if mutant.missed_by == name]
    metafunc.parametrize("seeded_bug", [NONE, *bugs] if bugs else [], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and item.originalname in {mutant.missed_by for mutant in MUTANTS.values()}
        and item.callspec.params.get("backend", BACKEND) == BACKEND
    ]


@pytest.fixture(autouse=True)
def seeded_bug(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for function, code in [] if request.param == NONE else code_changes(request.param):
        monkeypatch.setattr(function, "__code__", code)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    assert isinstance(item, pytest.Function)
    if call.when == "call":
        ended = "failed" if call.excinfo else "passed"
        _results.setdefault(item.callspec.params["seeded_bug"], {})[item.originalname] = ended


def pytest_sessionfinish() -> None:
    Path(os.environ[RESULTS_VARIABLE]).write_text(json.dumps(_results))
