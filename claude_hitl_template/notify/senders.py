"""The senders that this service has, by kind of channel."""

from urllib.parse import urlsplit

from claude_hitl_template.config.secret_files import push_key_pem, read_smtp_password
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.notices import ChannelKind
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.email import EmailSender, MailServer
from claude_hitl_template.notify.posting import Poster
from claude_hitl_template.notify.push_keys import PushKey
from claude_hitl_template.notify.sender import Sender, Senders
from claude_hitl_template.notify.services import ServiceSender
from claude_hitl_template.notify.slack import SlackSender
from claude_hitl_template.notify.web_push import WebPushSender
from claude_hitl_template.notify.webhook import WebhookSender


def build_senders(settings: Settings) -> Senders:
    """One sender for each kind of channel that the settings have what it needs for."""
    targets = Targets(settings.webhook_hosts)
    key = PushKey.of_pem(push_key_pem(settings))
    senders: dict[ChannelKind, Sender] = {
        "webhook": WebhookSender(targets),
        "web_push": WebPushSender(Poster(targets), key, push_contact(settings)),
        "slack": SlackSender(),
        "apprise": ServiceSender(targets),
    }
    if settings.smtp_url is not None and settings.smtp_from is not None:
        server = MailServer.of(settings.smtp_url)
        senders["email"] = EmailSender(server, settings.smtp_from, lambda: _smtp_password(settings))
    return senders


def _smtp_password(settings: Settings) -> str | None:
    found = read_smtp_password(settings)
    return found.get_secret_value() if found else None


def push_contact(settings: Settings) -> str:
    """Who sends, for the push services: the service's own address. A phone needs HITL_PUBLIC_URL to be https anyway."""
    public = urlsplit(settings.public_url or "")
    host = public.hostname or ""
    return f"https://{host}" if public.scheme == "https" and "." in host else "https://localhost"
