"""Sends notices as mails over the operator's mail server."""

from collections.abc import Callable
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiosmtplib

from claude_hitl_template.domain.notices import Notice, Parcel
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.notify.sender import Outcome, Refused, Retry, Sent
from claude_hitl_template.presentation.html import templates
from claude_hitl_template.presentation.text import visible

TIMEOUT_S = 20.0
FOOTER = "The link shows the call after you have signed in. Opening it decides nothing."
_TEMPLATES = templates(Path(__file__).parent / "templates")


@dataclass(frozen=True)
class MailServer:
    """The mail server of HITL_SMTP_URL. `smtps://` is TLS from the beginning; `smtp://` is STARTTLS, required unless
    the server is on this machine."""

    host: str
    port: int
    is_tls: bool
    start_tls: bool | None
    user: str | None = None

    @classmethod
    def of(cls, url: str) -> "MailServer":
        found = urlsplit(url)
        host, is_tls = found.hostname or "", found.scheme == "smtps"
        is_local = host in ("127.0.0.1", "::1", "localhost")
        return cls(
            host=host,
            port=found.port or (465 if is_tls else 587),
            is_tls=is_tls,
            start_tls=False if is_tls else None if is_local else True,
            user=unquote(found.username) if found.username else None,
        )


def mail_address(given: str) -> str:
    """Checks an address that someone typed. Raises InvalidInput."""
    try:
        found = Address(addr_spec=given.strip())
    except (ValueError, IndexError, HeaderParseError) as error:  # whatever is wrong with it
        raise InvalidInput("must be a mail address, such as ann@example.org", "address") from error
    if not found.username or "." not in found.domain or not given.isascii() or len(given) > 254:
        raise InvalidInput("must be a mail address, such as ann@example.org", "address")
    return found.addr_spec


class EmailSender:
    """Sends over channels of the kind email, from `sender` to the address in the channel's settings.

    `password` is called for each mail, since another one may have been sent to the service.
    """

    def __init__(
        self,
        server: MailServer,
        sender: str,
        password: Callable[[], str | None],
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._server, self._sender, self._password, self._timeout_s = server, sender, password, timeout_s

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        to = str(parcel.channel.settings.get("address", ""))
        message = mail(parcel.notice, link, sender=self._sender, to=to)
        server = self._server
        try:
            await aiosmtplib.send(
                message,
                hostname=server.host,
                port=server.port,
                username=server.user,
                password=self._password(),
                use_tls=server.is_tls,
                start_tls=server.start_tls,
                timeout=self._timeout_s,
            )
        except aiosmtplib.SMTPRecipientsRefused as error:
            return _outcome("the mail server refused the address", min(one.code for one in error.recipients))
        except aiosmtplib.SMTPAuthenticationError as error:
            return _outcome("the mail server refused the user or the password", error.code)
        except aiosmtplib.SMTPResponseException as error:
            return _outcome("the mail server refused the mail", error.code)
        except aiosmtplib.SMTPTimeoutError:
            return Retry(f"the mail server did not answer within {self._timeout_s:g} s")
        except (aiosmtplib.SMTPException, OSError) as error:
            return Retry(f"the mail server cannot be used ({type(error).__name__})")
        return Sent()

    async def close(self) -> None:
        """Each mail has a connection of its own."""


def _outcome(what: str, code: int) -> Outcome:
    """By the first digit of the code: 4 may pass, 5 will not (RFC 5321)."""
    why = f"{what} ({code})"
    return Retry(why) if 400 <= code < 500 else Refused(why)


def mail(notice: Notice, link: str, *, sender: str, to: str) -> EmailMessage:
    """The mail about a notice. Mails about one approval are one thread."""
    title = " ".join(visible(notice.title).split())  # a line break would begin another header
    about = f"Severity: {notice.severity}" if notice.approval_id is not None else ""
    domain = sender.rpartition("@")[2]
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = sender, to, title
    message["Date"] = format_datetime(notice.created_at)
    message["Message-ID"] = f"<{notice.id}@{domain}>"
    message["References"] = f"<{notice.approval_id or notice.session_id or notice.id}@{domain}>"
    message["Auto-Submitted"] = "auto-generated"
    text = "\n\n".join(part for part in (title, about, f"Open it in the inbox: {link}", FOOTER) if part)
    message.set_content(f"{text}\n")
    html = _TEMPLATES.get_template("mail.html.j2").render(title=title, about=about, link=link, footer=FOOTER)
    message.add_alternative(html, subtype="html")
    return message
