"""Sessions in containers: what Ray is told, and whether this machine can do it.

Ray starts a container by a shell command that it makes of `runtime_env`, with `podman` of the raylet's user. So nothing
but an image's name goes there (models.check_image_reference), and what is wrong is found here, before Ray is asked:
its own message for most of it is a worker that never comes.
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

ASK_S = 60.0  # podman answers within a second, but waits while an image is being loaded
PULL_S = 900.0
PULL_AGAIN_S, PULL_AGAIN_MOST_S = 5.0, 60.0  # between two pulls of an image that does not come
UNKNOWN_IMAGE = ("no such image", "image not known")
COPYING_DRIVERS = ("vfs",)
# A sandbox in a container has a /proc of its own, which the kernel grants only where nothing of the container's is masked.
UNMASK = "--security-opt=unmask=ALL"
NAME = "sandbox"  # as sandboxes without a container are called
CLUSTER_LABEL = "org.claude-hitl.cluster"
SHIM = Path(__file__).parents[1] / "bin"
# The owner's own process is in the container too: memory, and the threads of Ray's worker.
OWNER_BYTES = 512 * 1024**2
OWNER_THREADS = 512
SUBORDINATE_IDS = (Path("/etc/subuid"), Path("/etc/subgid"))
BUILD = "./hitl image build --from-host makes one of this machine, ./hitl image build one of Ray's own image"


type Pull = Callable[[str], str]


def runtime_env(image: str) -> dict[str, Any]:
    """What Ray needs to start an owner in a container. Everyone on the cluster can read it. Raises ValueError."""
    return {"image_uri": check_image_reference(image)}


def raylet_environment(
    folder: Path, cluster: Path, image: str, memory_bytes: int, processes: int
) -> dict[str, str]:
    """What the raylet's environment needs besides, for containers that end cleanly (see bin/podman). Blocking.

    `cluster`: Ray's folder. `folder`: one of ours for the hook's description, which no container may see.
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
        # Ray repeats a failure for ten minutes without trying again, whatever was mended meanwhile.
        "BAD_RUNTIME_ENV_CACHE_TTL_SECONDS": "0",
        "PATH": f"{SHIM}:{os.environ.get('PATH', os.defpath)}",
    }


def _run_flags(cluster: Path, image: str, memory_bytes: int, processes: int) -> list[str]:
    """Limits of the kernel's own are among them where this machine can set them for containers that are not root's
    (cgroup v2, delegated): that is tried, with the image. Elsewhere only the owner's own watch limits a session."""
    always = [
        "--rm",
        f"--label={_label(cluster)}",
        f"--hostname={NAME}",  # with the host's network, podman would take this machine's
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
    """Ends and removes the containers that a cluster has left. Blocking."""
    left = _podman("ps", "--all", "--quiet", f"--filter=label={_label(cluster)}").stdout.split()
    if left:
        _podman("rm", "--force", "--time=0", *left)


def _label(cluster: Path) -> str:
    """Tells the containers of one cluster from those of another."""
    return f"{CLUSTER_LABEL}={hashlib.sha256(str(cluster).encode()).hexdigest()[:12]}"


def pull(image: str) -> str:
    """Returns what podman complained of, if anything; whether the image came is seen by looking for it. Blocking."""
    return _words(_podman("pull", "--quiet", image, timeout_s=PULL_S))


def examine(image: str, pull: Pull = pull) -> Iterator[Check]:
    """What sessions in this image need of this machine, in the order in which a human would mend it. Blocking."""
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
    """The image as it is on this machine, pulled if it was not there. Blocking. Raises ConfigError: what to mend."""
    for check in examine(image, pull):
        if check.level == "wrong":
            raise ConfigError(f"sessions cannot run in {image}: {check.name}: {check.found}", check.fix)
    return facts(image, _inspect(image) or {})


def facts(image: str, inspected: dict[str, Any]) -> ImageFacts:
    """What `podman image inspect` says, as far as users want to know it."""
    said = inspected.get("Labels") or {}
    # The digest that a registry knows; podman's own .Digest is another one once the image was pushed.
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
    """A container did not start, and Ray said this: the reason, for a human. Blocking."""
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
    """Of one image: one at a time, and not again at once after one that brought nothing."""

    def __init__(self) -> None:
        self.backoff = Backoff(PULL_AGAIN_S, PULL_AGAIN_MOST_S)
        self._one_at_a_time = threading.Lock()
        self._said = ""

    def pull(self, image: str) -> str:
        with self._one_at_a_time:
            if self.backoff.left_s:
                return f"{self._said} (the next try is in {self.backoff.left_s:.0f} s)"
            self._said = pull(image)
            self.backoff.failed()  # until the image is seen
            return self._said


@dataclass
class Preflight:
    """Preflights, each remembered for a while: what is well stays well for longer than a start takes. An image that could
    not be pulled is not pulled again at once, whoever asks; one that somebody puts on this machine counts at once."""

    keep_s: float = 60.0

    def __post_init__(self) -> None:
        self._known: dict[str, tuple[float, ImageFacts]] = {}
        self._pulls: dict[str, _Pulls] = {}
        self._pulling = threading.Lock()

    def check(self, image: str) -> ImageFacts:
        """Blocking. Raises ConfigError."""
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
        """What was found last, however long ago."""
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
    """Rootless containers need ids of their own to map the image's users to."""
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
    """Ray talks to workers of its own version and Python only."""
    if labels.RAY not in said:
        return Check("image versions", "wrong", f"{image} was not built by ./hitl image build", BUILD)
    wanted = {"Ray": (said[labels.RAY], version("ray")), "Python": (said.get(labels.PYTHON), python_minor())}
    other = [f"{name} {has} in the image, {ours} here" for name, (has, ours) in wanted.items() if has != ours]
    if other:
        return Check("image versions", "wrong", "; ".join(other), f"make the image anew: {BUILD}")
    return Check("image versions", "ok", f"Ray {version('ray')}, Python {python_minor()}")


def _entrypoint_check(entrypoint: Any) -> Check:
    if entrypoint:
        fix = "remove ENTRYPOINT from the Dockerfile; ./hitl image build makes one without"
        return Check(
            "image entry point", "wrong", f"the image has one ({entrypoint}), and Ray's own must run", fix
        )
    return Check("image entry point", "ok", "none")


def _inspect(image: str) -> dict[str, Any] | None:
    """None when there is no such image here. Raises ConfigError when podman does not say."""
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
    """Its answer; one that does not come is a failure like any other.

    Go by what it printed: in Ray's workers, which leave it to the raylet to see children end, the exit status is always 0.
    """
    command = ["podman", *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            command, 124, "", f"podman {args[0]} said nothing for {timeout_s:g} s"
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"podman does not run: {error}")


def _words(done: "subprocess.CompletedProcess[str]") -> str:
    """What podman complained of last."""
    return last_line(done.stderr) or "podman failed without a word"


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
