"""The senders that this service has, by kind of channel."""

from urllib.parse import urlsplit

from claude_hitl_template.config.secret_files import push_key_pem
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.posting import Poster
from claude_hitl_template.notify.push_keys import PushKey
from claude_hitl_template.notify.sender import Senders
from claude_hitl_template.notify.web_push import WebPushSender
from claude_hitl_template.notify.webhook import WebhookSender


def build_senders(settings: Settings) -> Senders:
    """One sender for each kind of channel that the settings have what it needs for."""
    targets = Targets(settings.webhook_hosts)
    key = PushKey.of_pem(push_key_pem(settings))
    return {
        "webhook": WebhookSender(targets),
        "web_push": WebPushSender(Poster(targets), key, push_contact(settings)),
    }


def push_contact(settings: Settings) -> str:
    """Who sends, for the push services: the service's own address. A phone needs HITL_PUBLIC_URL to be https anyway."""
    public = urlsplit(settings.public_url or "")
    host = public.hostname or ""
    return f"https://{host}" if public.scheme == "https" and "." in host else "https://localhost"
