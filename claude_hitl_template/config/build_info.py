"""The facts that `./hitl deploy` writes into its package: the origin of the code, and its requirements of the cluster."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from packaging.utils import canonicalize_name

from claude_hitl_template.errors import ConfigError

FILE = "code.json"
# The cluster must have exactly this version: both ends of a protocol, and what the gate was tested with.
EXACTLY = ("ray", "claude-agent-sdk", "kodosumi")
NAMED = 5
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Origin:
    """`commit`: the whole hash, "unknown" outside of git. `package`: 12 hexadecimal characters over all of its content.

    `python`: the minor version, as "3.12". `locked`: versions by distribution, as requirements.lock has them.
    """

    commit: str
    dirty: bool
    package: str
    python: str
    locked: dict[str, str]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    def facts(self) -> dict[str, Any]:
        """The fields that GET /v1/version shows."""
        return {"commit": self.commit, "dirty": self.dirty, "package": self.package}


def origin(root: Path = ROOT) -> Origin | None:
    """The origin that the deployed package records; None if the code runs from a checkout.

    Raises ConfigError for one that no `./hitl deploy` wrote.
    """
    try:
        return Origin(**json.loads((root / FILE).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{root / FILE} cannot be read: {error}", "./hitl deploy again") from error


def describe_origin(facts: Mapping[str, Any]) -> str:
    """Describes the deployed code by commit, uncommitted changes and package; "" if it was not deployed."""
    if not facts.get("package"):
        return ""
    changed = ", with changes that are not committed" if facts.get("dirty") else ""
    return f"commit {str(facts.get('commit'))[:12]}{changed}, package {facts['package']}"


def started_in() -> Path:
    """The current folder; for deployed code, the one in which Ray was started: its own goes with the next deploy."""
    here = Path.cwd()
    if here != ROOT or not (ROOT / FILE).exists():
        return here
    for process in psutil.Process().parents():
        if process.name() == "raylet":
            return Path(process.cwd())
    return here


def python_minor() -> str:
    """The minor version of this Python, for instance "3.12": development machine, cluster and image must have the same."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def check_machine(found: Origin) -> None:
    """Raises ConfigError with the missing dependencies if this machine cannot run the package."""
    if found.python != python_minor():
        raise ConfigError(
            f"the code was deployed from Python {found.python}, and the cluster runs {python_minor()}",
            f"start the cluster with Python {found.python}, or make .venv on your machine with {python_minor()}",
        )
    lacks = missing(found.locked)
    if lacks:
        more = f" and {len(lacks) - NAMED} more" if len(lacks) > NAMED else ""
        raise ConfigError(
            f"the cluster's Python does not have what the code needs: {', '.join(lacks[:NAMED])}{more}",
            "on the cluster, install this requirements.lock into the Python that runs Ray, then restart it",
        )


def missing(locked: Mapping[str, str]) -> list[str]:
    """Dependencies that are missing here or, for those of EXACTLY, have another version."""
    return [lack for name, wanted in locked.items() if (lack := _lack(canonicalize_name(name), wanted))]


def _lack(name: str, wanted: str) -> str | None:
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"{name} {wanted} (missing)"
    return f"{name} {wanted} (it has {found})" if name in EXACTLY and found != wanted else None
