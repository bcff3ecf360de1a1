"""Reads HITL_OIDC_ROLES: which roles the groups of the sign-in provider give."""

from collections.abc import Sequence
from dataclasses import dataclass

from claude_hitl_template.domain.people import EVERYWHERE, WORKSPACE_ROLES, Role

DEFAULT = "default"  # in place of a workspace: the default one
EVERYONE = "*"  # in place of a group: each user that the provider signs in


@dataclass(frozen=True)
class GroupRole:
    """Members of `group` have `role` in `workspace`, which is an id, a name, "default" or people.EVERYWHERE."""

    group: str
    workspace: str
    role: Role


def read_group_roles(text: str) -> Sequence[GroupRole]:
    """Reads `GROUP=WORKSPACE:ROLE;GROUP=WORKSPACE:ROLE`. Names of groups may contain `=`, as those of LDAP do.

    Raises ValueError, which quotes the entry.
    """
    return tuple(_read(entry.strip()) for entry in text.split(";") if entry.strip())


def _read(entry: str) -> GroupRole:
    group, _, given = entry.rpartition("=")
    workspace, _, role = (part.strip() for part in given.rpartition(":"))
    if not group.strip() or not workspace:
        raise ValueError(f"{entry!r} is not GROUP=WORKSPACE:ROLE")
    if role not in tuple(Role):
        raise ValueError(f"{entry!r}: there is no role {role!r}; there are {', '.join(Role)}")
    if role not in WORKSPACE_ROLES and workspace != EVERYWHERE:
        raise ValueError(f"{entry!r}: the role {role} is of the whole service, so write {EVERYWHERE}:{role}")
    return GroupRole(group.strip(), workspace, Role(role))
