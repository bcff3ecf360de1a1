"""Runs docker, podman or buildah, whichever is installed: build, inspect, push and prune."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from claude_hitl_template.domain.models import check_image_reference
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import labels
from claude_hitl_template.image.run import run, show

# Ray starts containers with podman, whose images buildah shares; docker's are its own.
ToolName = Literal["podman", "buildah", "docker"]
FIX_BUILD = (
    "read what it said above; where the base image cannot be pulled, name another with --base, or make one of this "
    "machine with --from-host"
)


@dataclass(frozen=True)
class Tool:
    """One of the programs, by the path of it."""

    name: ToolName
    program: str

    def build(
        self,
        folder: Path,
        *,
        tags: list[str],
        build_args: Mapping[str, str],
        image_labels: Mapping[str, str],
    ) -> None:
        """Builds `folder/Dockerfile`. Its output goes to the user. Raises ConfigError."""
        command = [self.program, "build"]
        command += ["--format=docker", "--layers"] if self.name == "buildah" else []
        command += ["--format=docker"] if self.name == "podman" else []
        command += [f"--tag={check_reference(tag)}" for tag in tags]
        command += [f"--build-arg={name}={value}" for name, value in build_args.items()]
        command += [f"--label={name}={value}" for name, value in image_labels.items()]
        show([*command, "."], FIX_BUILD, cwd=folder)

    def has(self, image: str) -> bool:
        try:
            self.inspect(image)
        except ConfigError:
            return False
        return True

    def inspect(self, image: str) -> dict[str, Any]:
        """A local image's facts as docker reports them (`Config`, `Size`, `RepoDigests`). Raises ConfigError."""
        name = check_reference(image)
        if self.name == "buildah":
            found = json.loads(run([self.program, "inspect", "--type=image", name], FIX_NO_IMAGE))
            digest = found.get("FromImageDigest")
            digests = [f"{_repository(name)}@{digest}"] if digest else []
            return {"Config": found["Docker"]["config"], "RepoDigests": digests, "Id": found["FromImageID"]}
        return dict(json.loads(run([self.program, "image", "inspect", name], FIX_NO_IMAGE))[0])

    def pull(self, image: str) -> None:
        """Its output goes to the user. Raises ConfigError."""
        show([self.program, "pull", check_reference(image)], FIX_BUILD)

    def pinned(self, image: str) -> str | None:
        """A local image as name@digest; None where its digest is not known."""
        digests = [str(digest) for digest in self.inspect(image).get("RepoDigests") or []]
        return next((digest for digest in digests if "@sha256:" in digest), None)

    def push(self, image: str) -> str:
        """Pushes an image; returns its name with the digest that the registry knows it by. Raises ConfigError."""
        name = check_reference(image)
        self.inspect(name)
        fix = f"log in where it is pushed to ({self.name} login), and name the registry: --name HOST/NAME"
        if self.name == "docker":
            show([self.program, "push", name], fix)
            digests = self.inspect(name).get("RepoDigests") or []
            repository = _repository(name)
            return next((str(d) for d in digests if str(d).startswith(f"{repository}@")), name)
        with tempfile.NamedTemporaryFile() as digest:
            # Local storage is uncompressed: its digest differs from the registry's.
            show([self.program, "push", f"--digestfile={digest.name}", name], fix)
            return f"{_repository(name)}@{Path(digest.name).read_text().strip()}"


FIX_NO_IMAGE = "build it with ./hitl image build, or pull it; `podman images` lists local ones"


def find_tool(chosen: ToolName | None = None, among: tuple[ToolName, ...] = get_args(ToolName)) -> Tool:
    """The chosen program, or the first one that is there. Raises ConfigError that says what to install."""
    if chosen and chosen not in among:
        raise ConfigError(f"{chosen} cannot do that", f"choose {' or '.join(among)} with --tool")
    for name in (chosen,) if chosen else among:
        program = shutil.which(name)
        if program:
            return Tool(name, program)
    if chosen:
        raise ConfigError(f"there is no {chosen} here", f"apt install {chosen}, or leave --tool out")
    raise ConfigError(f"there is no {' or '.join(among)} here", f"apt install {among[0]}")


def check_reference(image: str) -> str:
    """Raises ConfigError unless it names an image: what it names reaches command lines."""
    try:
        return check_image_reference(image)
    except ValueError as error:
        raise ConfigError(f"{image!r} cannot be used: {error}", "correct the name") from error


def prune() -> int:
    """Removes exited containers of our images; returns how many. Ray leaves one behind for every worker that ended.

    Running ones, those that are just being made, and other people's stay. Raises ConfigError where podman fails.
    """
    podman = find_tool("podman").program
    filters = ["--filter=status=exited", f"--filter=label={labels.VERSION}"]
    fix = "`podman ps --all` shows the problem"
    exited = run([podman, "ps", "--all", "--quiet", "--no-trunc", *filters], fix).split()
    if exited:
        run([podman, "rm", "--ignore", "--", *exited], fix)
    return len(exited)


def _repository(image: str) -> str:
    """A reference without tag and digest."""
    name = image.partition("@")[0]
    head, _, last = name.rpartition("/")
    return f"{head}/{last.partition(':')[0]}" if head else last.partition(":")[0]
