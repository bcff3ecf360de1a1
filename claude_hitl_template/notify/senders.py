"""The senders that this service has, by kind of channel."""

from claude_hitl_template.config.settings import Settings
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.sender import Senders
from claude_hitl_template.notify.webhook import WebhookSender


def build_senders(settings: Settings) -> Senders:
    """One sender for each kind of channel that the settings have what it needs for."""
    return {"webhook": WebhookSender(Targets(settings.webhook_hosts))}
