"""Builds the image: checks the checkout, makes a base image if none can be pulled, stages, builds and tags."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.context import read_checkout, stage
from claude_hitl_template.image.host import account_of, build_base, load_for
from claude_hitl_template.image.tools import Tool, check_reference

DEFAULT_UID = 1000


@dataclass(frozen=True)
class Built:
    """A built image. `tags`: its names, the one with version and commit first; `size_bytes`: unpacked."""

    tags: list[str]
    size_bytes: int | None
    seconds: float
    manifest: dict[str, Any]


def build(
    root: Path,
    tool: Tool,
    *,
    name: str,
    base: str | None = None,
    from_host: bool = False,
    for_user: str | None = None,
    say: Callable[[str], None],
) -> Built:
    """Raises ConfigError for a problem of the checkout or this machine, where possible before the build starts.

    `name` has no tag. `for_user` copies the image into that user's storage, too.
    """
    began = time.monotonic()
    if ":" in name.rpartition("/")[2] or "@" in name:
        raise ConfigError(
            f"{name!r} has a tag or a digest", "give the name alone; version and commit are the tag"
        )
    checkout = read_checkout(root)
    tags = [check_reference(f"{name}:{tag}") for tag in (checkout.tag, "latest")]
    account = account_of(for_user) if for_user else None
    uid = account.pw_uid if account else os.getuid() or DEFAULT_UID  # root cannot run containers of Ray's
    if from_host:
        say("Making a base image from this machine (takes some minutes when it changed)")
        base = build_base(checkout, tool)
    base = check_reference(
        base or f"rayproject/ray:{checkout.lock['ray']}-py{python_minor().replace('.', '')}"
    )
    pinned = pin_base(tool, base, say)
    digest = pinned.partition("@")[2] or None
    with tempfile.TemporaryDirectory(prefix="hitl-image-") as folder:
        staged = stage(checkout, Path(folder), base=base, base_digest=digest, offline=from_host)
        for plugin in staged.manifest["plugins"]:
            say(f"plugin {plugin['name']}@{plugin['marketplace']}: {plugin['commit']}")
        arguments = {"RAY_BASE": base if from_host else pinned, "RAY_UID": str(uid)}
        tool.build(staged.folder, tags=tags, build_args=arguments, image_labels=staged.labels)
    if account:
        say(f"Copying it to {account.pw_name}")
        load_for(tool, tags, account)
    size = tool.inspect(tags[0]).get("Size")
    return Built(tags, size, time.monotonic() - began, staged.manifest)


def pin_base(tool: Tool, base: str, say: Callable[[str], None]) -> str:
    """The base image by its digest, pulled if it is not here; just its name where no digest is known. Says so of a name
    that a registry may give to another image. Raises ConfigError where it cannot be pulled."""
    if "@sha256:" in base:
        return base
    if not tool.has(base):
        tool.pull(base)
    pinned = tool.pinned(base)
    if not base.startswith("localhost/"):
        taken = f"This build takes {pinned}" if pinned else "Which one this build takes cannot be told"
        say(
            f"Warning: {base} has no digest, and its registry may give that name to another image. {taken}. "
            "Name it by digest (--base NAME@sha256:..., or RAY_BASE) to build on the same one again"
        )
    return pinned or base
