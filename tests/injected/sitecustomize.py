"""Python imports this at startup if this folder is on its path; it activates the plans of faults.py and mutants.py.

They count in the product's modules as these are imported, wherever from: a deployed copy may be another one than here.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parents[1]
FAULT_POINTS = "claude_hitl_template.fault_points"
STORE = "claude_hitl_template.store."


def beside(name: str) -> Any:
    """Imports a module of the tests, which need not be on the path."""
    spec = importlib.util.spec_from_file_location(f"hitl_injected_{name}", TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def imported(module: ModuleType) -> None:
    """Called after one of the product's modules was imported."""
    folder, bugs = os.environ.get("HITL_TEST_FAULTS"), os.environ.get("HITL_TEST_BUGS")
    if module.__name__ == FAULT_POINTS and folder:
        beside("faults").install(Path(folder))
    elif bugs and module.__name__.startswith(STORE):
        beside("mutants").install(bugs.split(","), module)


class AfterImport:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != FAULT_POINTS and not name.startswith(STORE):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                imported(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AfterImport)
