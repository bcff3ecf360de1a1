"""`hitl shell`."""

from claude_hitl_template.cli.deploy.rollout import Profile
from claude_hitl_template.cli.host.processes import authenticate
from claude_hitl_template.config.settings import Settings


def shell(profile: Profile = None) -> None:
    """A Python prompt on the cluster, through Ray Client: `ray`, `store`, `settings`."""
    settings = Settings.load(profile)
    authenticate(settings)  # before Ray is imported, which reads it once
    from claude_hitl_template.cli.deploy.ray_prompt import open_shell  # noqa: PLC0415

    open_shell(settings)
