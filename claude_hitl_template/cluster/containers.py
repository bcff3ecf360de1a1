"""Sessions in containers: the `runtime_env` for Ray, and checks that this machine can run an image.

Ray builds a shell command from `runtime_env` and starts the container with `podman` as the raylet's user. So
`runtime_env` contains only an image's name (models.check_image_reference). Problems are detected here, before Ray starts
anything: for most of them Ray reports no error, and the worker never appears.
"""

import getpass
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from claude_hitl_template.cluster.clocks import Backoff
from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.domain.models import ImageFacts, check_image_reference
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import labels
from claude_hitl_template.presentation.checks import Check
from claude_hitl_template.presentation.text import last_line

ASK_S = 60.0  # podman usually answers within a second, but blocks while an image is being loaded
PULL_S = 900.0
PULL_AGAIN_S, PULL_AGAIN_MOST_S = 5.0, 60.0  # between two failed pulls of an image
UNKNOWN_IMAGE = ("no such image", "image not known")
COPYING_DRIVERS = ("vfs",)
# A sandbox in a container mounts its own /proc, which the kernel permits only if the container's /proc is not masked.
UNMASK = "--security-opt=unmask=ALL"
NAME = "sandbox"  # the host name in sandboxes without a container, too
CLUSTER_LABEL = "org.claude-hitl.cluster"
SHIM = Path(__file__).parents[1] / "bin"
# The owner's process runs in the container, too: its memory, and the threads of Ray's worker.
OWNER_BYTES = 512 * 1024**2
OWNER_THREADS = 512
SUBORDINATE_IDS = (Path("/etc/subuid"), Path("/etc/subgid"))
BUILD = "./hitl image build --from-host makes one of this machine, ./hitl image build one of Ray's own image"


type Pull = Callable[[str], str]


def runtime_env(image: str) -> dict[str, Any]:
    """Returns the `runtime_env` that starts an owner in a container. Every client of the cluster can read it.

    Raises:
        ValueError: `image` is not an image reference.
    """
    return {"image_uri": check_image_reference(image)}


def raylet_environment(
    folder: Path, cluster: Path, image: str, memory_bytes: int, processes: int
) -> dict[str, str]:
    """Returns the raylet's additional environment variables, which make containers end cleanly (see bin/podman). Blocking.

    Args:
        folder: A folder of the service for the hook's description, which no container may see.
        cluster: Ray's folder.
        image: The image with which the kernel's limits are tried.
        memory_bytes: The memory limit of a container.
        processes: The process limit of a container.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hook = {
        "version": "1.0.0",
        "hook": {"path": str(SHIM / "end-left")},
        "when": {"always": True},
        "stages": ["poststop"],
    }
    (folder / "end-left.json").write_text(json.dumps(hook))
    return {
        "HITL_PODMAN_RUN": " ".join(_run_flags(cluster, image, memory_bytes, processes)),
        "HITL_PODMAN_HOOKS": str(folder),
        # By default Ray reports a failed start again for ten minutes without a new try, even if the cause was fixed.
        "BAD_RUNTIME_ENV_CACHE_TTL_SECONDS": "0",
        "PATH": f"{SHIM}:{os.environ.get('PATH', os.defpath)}",
    }


def _run_flags(cluster: Path, image: str, memory_bytes: int, processes: int) -> list[str]:
    """Returns the flags of `podman run`. They include kernel limits if this machine can set them for rootless containers
    (delegated cgroup v2), which is tried with the image. Otherwise only the owner's `watch` limits a session."""
    always = [
        "--rm",
        f"--label={_label(cluster)}",
        f"--hostname={NAME}",  # with the host's network, podman would use this machine's name
        f"--add-host={NAME}:127.0.0.1",
        "--security-opt=no-new-privileges",
        "--cap-drop=all",
        UNMASK,
    ]
    memory = memory_bytes + OWNER_BYTES
    limits = [f"--memory={memory}", f"--memory-swap={memory}", f"--pids-limit={processes + OWNER_THREADS}"]
    tried = _podman("run", "--cgroup-manager=cgroupfs", *always, *limits, "--entrypoint=true", image)
    return [*always, *limits] if tried.returncode == 0 and not tried.stderr.strip() else always


def remove_left(cluster: Path) -> None:
    """Ends and removes the containers that a cluster left behind. Blocking."""
    left = _podman("ps", "--all", "--quiet", f"--filter=label={_label(cluster)}").stdout.split()
    if left:
        _podman("rm", "--force", "--time=0", *left)


def _label(cluster: Path) -> str:
    """The label that distinguishes this cluster's containers from those of others."""
    return f"{CLUSTER_LABEL}={hashlib.sha256(str(cluster).encode()).hexdigest()[:12]}"


def pull(image: str) -> str:
    """Pulls an image and returns podman's error output, if any; inspect the image to see if the pull succeeded. Blocking."""
    return _words(_podman("pull", "--quiet", image, timeout_s=PULL_S))


def examine(image: str, pull: Pull = pull) -> Iterator[Check]:
    """Checks what sessions in this image need of this machine, in the order in which to fix it. Blocking."""
    yield user_check(os.getuid())
    podman = shutil.which("podman")
    yield _podman_check(podman)
    if podman is None:
        return
    yield ids_check(getpass.getuser(), os.getuid(), SUBORDINATE_IDS)
    storage = _storage_check()
    yield storage
    if storage.level != "wrong":
        yield from _image_checks(image, pull)


def preflight(image: str, pull: Pull = pull) -> ImageFacts:
    """Checks that sessions can run in this image, pulls it if it is missing, and returns its facts. Blocking.

    Raises:
        ConfigError: They cannot; it says how to fix it.
    """
    for check in examine(image, pull):
        if check.level == "wrong":
            raise ConfigError(f"sessions cannot run in {image}: {check.name}: {check.found}", check.fix)
    return facts(image, _inspect(image) or {})


def facts(image: str, inspected: dict[str, Any]) -> ImageFacts:
    """Selects the facts for users from the output of `podman image inspect`."""
    said = inspected.get("Labels") or {}
    # The registry's digest; podman's own .Digest differs from it after the image was pushed.
    digests = [one for one in inspected.get("RepoDigests") or [] if not one.startswith("localhost/")]
    return ImageFacts(
        reference=image,
        digest=digests[0].partition("@")[2] if digests else None,
        version=said.get(labels.VERSION, ""),
        commit=said.get(labels.COMMIT, ""),
        ray=said.get(labels.RAY, ""),
        python=said.get(labels.PYTHON, ""),
        manifest=_json_object(said.get(labels.MANIFEST, "")),
    )


def why_not_started(image: str, said: str, check: Callable[[str], ImageFacts] = preflight) -> str:
    """Explains to a person why a container did not start; `said` is Ray's error. Blocking."""
    try:
        check(image)
    except ConfigError as error:
        return str(error)
    lines = [line.strip() for line in said.replace("\\n", "\n").splitlines() if "rror" in line]
    return (
        f"the container of {image} could not be started: {lines[-1][:500] if lines else said[:500]}. "
        "./hitl doctor looks at everything it needs, ./hitl image verify at the image; then send your message again"
    )


class _Pulls:
    """Pulls of one image: one at a time, with a pause after each that failed."""

    def __init__(self) -> None:
        self.backoff = Backoff(PULL_AGAIN_S, PULL_AGAIN_MOST_S)
        self._one_at_a_time = threading.Lock()
        self._said = ""

    def pull(self, image: str) -> str:
        with self._one_at_a_time:
            if self.backoff.left_s:
                return f"{self._said} (the next try is in {self.backoff.left_s:.0f} s)"
            self._said = pull(image)
            self.backoff.failed()  # until the image is found
            return self._said


@dataclass
class Preflight:
    """Caches successful preflights for `keep_s`, because several sessions may start in that time. All callers share one
    backoff between failed pulls of an image; an image that a user loads meanwhile is found at the next check."""

    keep_s: float = 60.0

    def __post_init__(self) -> None:
        self._known: dict[str, tuple[float, ImageFacts]] = {}
        self._pulls: dict[str, _Pulls] = {}
        self._pulling = threading.Lock()

    def check(self, image: str) -> ImageFacts:
        """Returns the cached facts of the image, or runs `preflight`. Blocking. Raises ConfigError."""
        at, known = self._known.get(image, (0.0, None))
        if known is not None and time.monotonic() - at < self.keep_s:
            return known
        try:
            with self._pulling:
                pulls = self._pulls.setdefault(image, _Pulls())
            found = preflight(image, pulls.pull)
        except ConfigError:
            self.forget(image)
            raise
        pulls.backoff.succeeded()
        self._known[image] = (time.monotonic(), found)
        return found

    def last(self, image: str) -> ImageFacts | None:
        """Returns the facts that were found last, regardless of their age; None if there are none."""
        return self._known.get(image, (0.0, None))[1]

    def forget(self, image: str) -> None:
        self._known.pop(image, None)


def user_check(uid: int) -> Check:
    if uid != 0:
        return Check("user", "ok", f"{getpass.getuser()}, not root")
    return Check(
        "user",
        "wrong",
        "Ray runs as root, and podman makes rootless containers for other users only",
        "start the service as another user: useradd -m ray, then run ./hitl up as ray",
    )


def _podman_check(path: str | None) -> Check:
    if path is None:
        return Check("podman", "wrong", "not found on PATH", "apt install podman uidmap fuse-overlayfs")
    return Check("podman", "ok", path)


def ids_check(user: str, uid: int, files: tuple[Path, ...]) -> Check:
    """Rootless containers need subordinate ids, to which the image's users are mapped."""
    missing = [str(path) for path in files if not _has_range(path, user, uid)]
    if missing:
        return Check(
            "subordinate ids",
            "wrong",
            f"{user} has no range in {' and '.join(missing)}",
            f"as root: usermod --add-subuids 200000-265535 --add-subgids 200000-265535 {user}; "
            f"then as {user}: podman system migrate",
        )
    return Check("subordinate ids", "ok", "there")


def _has_range(path: Path, user: str, uid: int) -> bool:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return False
    return any(line.split(":")[0] in (user, str(uid)) and line.count(":") == 2 for line in lines)


def _storage_check() -> Check:
    done = _podman("info", "--format", "json")
    driver = str((_json_object(done.stdout).get("store") or {}).get("graphDriverName") or "")
    if not driver:
        fix = "run `podman info` as the service's user, and correct what it says"
        return Check("podman storage", "wrong", _words(done), fix)
    if driver in COPYING_DRIVERS:
        return Check(
            "podman storage",
            "warning",
            f"driver {driver} copies the whole image for every session",
            'apt install fuse-overlayfs; set driver = "overlay" and mount_program = "/usr/bin/fuse-overlayfs" in '
            "~/.config/containers/storage.conf; then podman system reset, and make the image again",
        )
    return Check("podman storage", "ok", driver)


def _image_checks(image: str, pull: Pull) -> Iterator[Check]:
    try:
        yield from _checks_of(image, pull)
    except ConfigError as error:
        yield Check("image", "wrong", error.message, error.fix)


def _checks_of(image: str, pull: Pull) -> Iterator[Check]:
    found = _inspect(image)
    why_not = ""
    if found is None and not image.startswith("localhost/"):
        why_not = f", and could not be pulled: {pull(image)}"
        found = _inspect(image)
    if found is None:
        where = f"{image} is not on this machine (as user {getpass.getuser()}){why_not}"
        own = _own_name(image.partition("@sha256:")[2])
        if own is None:
            yield Check("image", "wrong", where, BUILD)
        else:
            where += f"; its digest is this machine's own one of {own}, and a registry has another"
            yield Check("image", "wrong", where, "name it by the digest that ./hitl image push prints")
        return
    yield Check("image", "ok", f"{image} ({str(found.get('Id', ''))[:12]})")
    said = found.get("Labels") or {}
    yield _versions_check(image, said)
    yield _entrypoint_check((found.get("Config") or {}).get("Entrypoint"))
    if "@sha256:" not in image and not image.startswith("localhost/"):
        fix = "name it by the digest that ./hitl image push prints"
        yield Check("image name", "warning", f"{image} is a tag, which may be moved to another image", fix)


def _own_name(digest: str) -> str | None:
    """The name of the image here that podman gave this digest, which no registry need know; None: there is none."""
    if not digest:
        return None
    try:
        images: list[dict[str, Any]] = json.loads(_podman("images", "--format", "json").stdout or "[]")
    except ValueError:
        return None
    for image in images:
        names = [str(name) for name in image.get("RepoDigests") or []]
        if digest in (image.get("Id"), *(name.partition("@sha256:")[2] for name in names)):
            return names[0].partition("@")[0] if names else str(image.get("Id"))[:12]
    return None


def _versions_check(image: str, said: dict[str, str]) -> Check:
    """Ray requires workers to have its own version, and Python's."""
    if labels.RAY not in said:
        return Check("image versions", "wrong", f"{image} was not built by ./hitl image build", BUILD)
    wanted = {"Ray": (said[labels.RAY], version("ray")), "Python": (said.get(labels.PYTHON), python_minor())}
    other = [f"{name} {has} in the image, {ours} here" for name, (has, ours) in wanted.items() if has != ours]
    if other:
        return Check("image versions", "wrong", "; ".join(other), f"build the image again: {BUILD}")
    return Check("image versions", "ok", f"Ray {version('ray')}, Python {python_minor()}")


def _entrypoint_check(entrypoint: Any) -> Check:
    if entrypoint:
        fix = "remove ENTRYPOINT from the Dockerfile; ./hitl image build makes one without"
        return Check(
            "image entry point", "wrong", f"the image has one ({entrypoint}), and Ray's own must run", fix
        )
    return Check("image entry point", "ok", "none")


def _inspect(image: str) -> dict[str, Any] | None:
    """Returns the image's description; None if it is not on this machine. Raises ConfigError if podman fails."""
    done = _podman("image", "inspect", image)
    try:
        found = json.loads(done.stdout or "[]")
    except ValueError:
        found = []
    if found:
        return found[0]
    if any(words in done.stderr for words in UNKNOWN_IMAGE):
        return None
    fix = f"run `podman image inspect {image}` as the service's user, and correct what it says; it may only be busy"
    raise ConfigError(f"podman could not look for {image}: {_words(done)}", fix)


def _podman(*args: str, timeout_s: float = ASK_S) -> "subprocess.CompletedProcess[str]":
    """Runs podman and returns its result; a timeout, or a missing podman, is a failed result.

    Judge it by its output: in Ray's workers, where the raylet reaps child processes, the exit status is always 0.
    """
    command = ["podman", *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            command, 124, "", f"podman {args[0]} did not answer within {timeout_s:g} s"
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"podman does not run: {error}")


def _words(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of podman's error output."""
    return last_line(done.stderr) or "podman failed without an error message"


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
