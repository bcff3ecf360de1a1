"""A mail goes to the operator's server as it has to, and what the server answers decides the outcome."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel, Notice, Parcel
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.notify.email import EmailSender, MailServer, mail, mail_address
from claude_hitl_template.notify.sender import Outcome, Refused, Retry, Sent

LINK = "https://hitl.example.org/claude-hitl/inbox/a/appr_1"


class Postbox:
    """What a mail server does with mails: answers `answer` to the recipient, or keeps them."""

    def __init__(self, answer: str = "") -> None:
        self.answer, self.mails = answer, list[EmailMessage]()

    async def handle_RCPT(  # noqa: N802
        self, _server: Any, _session: Any, envelope: Any, to: str, _options: Any
    ) -> str:
        if self.answer:
            return self.answer
        envelope.rcpt_tos.append(to)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802
        found = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(found, EmailMessage)
        self.mails.append(found)
        return "250 kept"


@asynccontextmanager
async def serving(postbox: Postbox, **options: Any) -> AsyncIterator[int]:
    """A mail server on a port of this machine. Options are those of aiosmtpd's SMTP."""
    loop = asyncio.get_running_loop()
    made = await loop.create_server(
        lambda: SMTP(postbox, hostname="mail.test", loop=loop, **options), "127.0.0.1", 0
    )
    async with made:
        yield made.sockets[0].getsockname()[1]


def notice(**about: Any) -> Notice:
    return Notice(
        id="ntce_1",
        kind="approval.requested",
        workspace_id="w",
        approval_id="appr_1",
        severity="high",
        created_at=utcnow(),
        title="Bash waits for approval",
    ).but(**about)


async def send(port: int, *, user: str = "", password: str | None = None, **about: Any) -> Outcome:
    channel = Channel(
        id="chan_1", kind="email", workspace_id=EVERY_WORKSPACE, created_at=utcnow(),
        settings={"address": "ann@example.org"},
    )  # fmt: skip
    server = MailServer.of(f"smtp://{user}127.0.0.1:{port}")
    sender = EmailSender(server, "hitl@example.org", lambda: password, timeout_s=2)
    return await sender.send(
        Parcel(delivery_ids=("d",), attempt=1, notice=notice(**about), channel=channel), LINK
    )


async def test_a_mail_has_the_line_and_the_link_as_text_and_as_html() -> None:
    postbox = Postbox()
    async with serving(postbox) as port:
        assert await send(port) == Sent()
    [found] = postbox.mails
    assert (found["To"], found["From"], found["Subject"]) == (
        "ann@example.org", "hitl@example.org", "Bash waits for approval"
    )  # fmt: skip
    assert found["Auto-Submitted"] == "auto-generated"
    assert found["References"] == "<appr_1@example.org>"
    for kind in ("plain", "html"):
        body = found.get_body((kind,))
        assert body is not None
        assert LINK in body.get_content()
        assert "Opening it decides nothing" in body.get_content()


def test_a_title_can_begin_no_header_and_no_markup() -> None:
    made = mail(
        notice(title="one\r\nBcc: eve@example.org\n<script>x</script>"),
        LINK,
        sender="a@b.example",
        to="c@d.example",
    )
    assert made["Bcc"] is None
    read = message_from_bytes(made.as_bytes(), policy=policy.default)
    assert read["Bcc"] is None
    assert isinstance(read, EmailMessage)
    html = read.get_body(("html",))
    assert html is not None
    assert "<script>" not in html.get_content()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("450 later", Retry("the mail server refused the address (450)")),
        ("550 secret-words of the server", Refused("the mail server refused the address (550)")),
    ],
)
async def test_a_refusal_that_may_pass_is_tried_again_and_another_is_not(
    answer: str, expected: Outcome
) -> None:
    async with serving(Postbox(answer)) as port:
        assert await send(port) == expected


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """The context of a TLS server on 127.0.0.1, and the certificate that it is trusted by."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mail.test")])
    address = x509.IPAddress(ip_address("127.0.0.1"))
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    trusted, private = folder / "cert.pem", folder / "key.pem"
    trusted.write_bytes(made.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(trusted, private)
    return context, trusted


async def test_the_password_is_sent_by_starttls_and_a_wrong_one_or_an_unknown_certificate_is_an_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, trusted = certificate(tmp_path)
    given: list[tuple[bytes, bytes]] = []

    def authenticate(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        given.append((data.login, data.password))
        return AuthResult(success=data.password == b"right", handled=False)

    postbox = Postbox()
    options = {
        "tls_context": context,
        "require_starttls": True,
        "authenticator": authenticate,
        "auth_required": True,
    }
    async with serving(postbox, **options) as port:
        unknown = await send(port, user="hitl@", password="right")
        assert isinstance(unknown, Retry)
        assert given == []
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        assert await send(port, user="hitl@", password="right") == Sent()
        assert given == [(b"hitl", b"right")]
        refused = await send(port, user="hitl@", password="wrong")
        assert refused == Refused("the mail server refused the user or the password (535)")
    assert len(postbox.mails) == 1


async def test_a_server_that_is_away_or_hangs_is_tried_again() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await send(port) == Retry("the mail server did not answer within 2 s")
    assert isinstance(await send(port), Retry)


def test_a_server_elsewhere_must_have_tls() -> None:
    assert MailServer.of("smtp://user@mail.example.org").start_tls is True
    assert MailServer.of("smtps://mail.example.org").is_tls
    assert MailServer.of("smtp://mail.example.org").port == 587


@pytest.mark.parametrize(
    "given",
    ["", "ann", "ann@", "@example.org", "ann@host", "ann@example.org, eve@example.org", "a\nb@example.org"],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        mail_address(given)
    assert caught.value.field == "address"
