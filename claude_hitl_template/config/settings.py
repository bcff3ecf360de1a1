"""The only reader of the environment. Every field is one variable `HITL_<NAME>`, or the alias it names.

Sources, first wins: the environment, the profile that a command names, `.env` in HITL_HOME, a file of the variable's name in
lower case in CREDENTIALS_DIRECTORY, the default here.
"""

import json
import os
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from claude_hitl_template.config import build_info
from claude_hitl_template.domain.group_roles import read_group_roles
from claude_hitl_template.domain.models import Environment, ImageReference, Networking
from claude_hitl_template.domain.policy.floor import Floor, read_floor
from claude_hitl_template.domain.policy.web import check_entry
from claude_hitl_template.errors import ConfigError

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(ge=0, le=10 * 365 * 86400)]


EnvironmentId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class EnvironmentChoice(BaseModel):
    """One of HITL_ENVIRONMENTS. Without an image, its sessions are local processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str | None = None
    description: str | None = None
    image: ImageReference | None = None
    networking: Networking = Networking()

    def reaching(self, private_hosts: tuple[str, ...]) -> Self:
        """Also reaches these hosts at private addresses."""
        listed = self.networking.but(private_hosts=(*self.networking.private_hosts, *private_hosts))
        return self.model_copy(update={"networking": listed})


def _without_credentials(url: str) -> str:
    if "@" in urlsplit(url).netloc:
        raise ValueError(
            "it holds credentials, and every process could read them; keep them in the file system's own file, as "
            "~/.aws/credentials"
        )
    return url


def _address(schemes: tuple[str, ...]) -> AfterValidator:
    """SCHEME://HOST[:PORT] and nothing else: we add the path, and credentials would be logged."""

    def check(url: str) -> str:
        found = urlsplit(_without_credentials(url))
        _ = found.port  # raises ValueError for one that is not a number
        if found.scheme not in schemes or not found.hostname or found.path.strip("/") or found.query:
            raise ValueError(f"must be {schemes[0]}://HOST:PORT")
        return url.rstrip("/")

    return AfterValidator(check)


def _listening_address(host: str) -> str:
    """An IPv4 address to listen on: neither Ray nor our other processes fully support IPv6."""
    host = host.strip()
    if host.lower() == "localhost":
        return LOOPBACK
    choice = (
        f"{LOOPBACK} (this machine only), 0.0.0.0 (all of its addresses), or one IPv4 address that it has"
    )
    try:
        found = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError(f"{host!r} is not an IPv4 address; set it to {choice}") from None
    if found.version != 4:
        raise ValueError(f"{host!r} is an IPv6 address, which Ray cannot listen on here; set it to {choice}")
    if found.is_multicast or found.is_reserved or (found in _NO_HOST and not found.is_unspecified):
        raise ValueError(f"no machine has the address {host!r}; set it to {choice}")
    return str(found)


def _issuer(url: str) -> str:
    """Kept to the letter: the provider's answers name it in exactly this way."""
    found = urlsplit(_without_credentials(url))
    if found.scheme != "https" and not (found.scheme == "http" and found.hostname in _LOOPBACK_NAMES):
        raise ValueError("must begin with https://; http only reaches a provider on this machine")
    if not found.hostname or found.query or found.fragment:
        raise ValueError("must be https://HOST/PATH without a query")
    return url


def _mail_server(url: str) -> str:
    found = urlsplit(url)
    _ = found.port  # raises ValueError for one that is not a number
    if found.password is not None:
        raise ValueError("it holds the password, and every process could read it; set HITL_SMTP_PASSWORD")
    if found.scheme not in ("smtp", "smtps") or not found.hostname or found.path.strip("/") or found.query:
        raise ValueError("must be smtps://USER@HOST:PORT or smtp://USER@HOST:PORT")
    return url


def _group_roles(text: str) -> str:
    read_group_roles(text)  # raises ValueError
    return text


def _entries(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


def _host_entries(text: str) -> str:
    for entry in _entries(text):
        check_entry(entry)  # raises ValueError
    return text


LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_NO_HOST = ip_network("0.0.0.0/8")
ListeningAddress = Annotated[str, AfterValidator(_listening_address)]


def _fits_in_a_header(secret: SecretStr) -> SecretStr:
    value = secret.get_secret_value()
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise ValueError("it must be printable ASCII without spaces")
    return secret


RayToken = Annotated[SecretStr, AfterValidator(_fits_in_a_header)]
HttpAddress = Annotated[str, _address(("http", "https"))]
Issuer = Annotated[str, AfterValidator(_issuer)]
RayAddress = Annotated[str, _address(("ray",))]


def _secret_files() -> Path | None:
    """The folder in which systemd, or a container's engine, puts secrets as files."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(folder) if folder and Path(folder).is_dir() else None


class Settings(BaseSettings):
    """What an operator can choose. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix="HITL_",
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
    )

    home: Path = Field(
        Path(),
        description="Folder of .env, and the base of a relative HITL_DATA_DIR. Default: the folder of ./hitl; without "
        "it the current folder, for deployed code the one in which Ray was started.",
    )
    data_dir: Path = Field(
        Path(".hitl"), description="Folder of all persistent data: database, workspaces, keys, logs."
    )
    database_url: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("DATABASE_URL"),
        description="Postgres database for all data, as postgresql://USER:PASSWORD@HOST:PORT/DATABASE. Default: SQLite in "
        "the data folder.",
    )
    ledger_replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="Number of ledger processes, which use the database; more than one needs Postgres.",
    )
    retention_days: float | None = Field(
        None,
        gt=0,
        le=36500,
        description="Archived sessions, and idle ones with nothing pending, are deleted this many days after their last "
        "change. Default: never.",
    )
    host: ListeningAddress = Field(
        LOOPBACK,
        description="IPv4 address that the ports below listen on. Other hosts can join Ray if they reach this host at "
        "it and it is neither a loopback address nor 0.0.0.0.",
    )
    ray_port: Port = Field(6379, description="Ray's GCS.")
    ray_client_port: Port = Field(10001, description="Ray Client.")
    dashboard_port: Port = Field(8265, description="Ray's dashboard.")
    serve_port: Port = Field(8001, description="The REST API, under /claude-hitl.")
    panel_port: Port = Field(3370, description="Kodosumi's panel: conversations and approvals in a browser.")
    ray_temp_dir: Path | None = Field(
        None,
        description="Folder of Ray's temporary files, closed to other users. Default: a folder under /tmp named "
        "after the data folder.",
    )
    ray_num_cpus: int | None = Field(
        None, ge=1, description="CPUs that Ray may schedule. Default: all of the machine's."
    )

    dashboard_url: HttpAddress | None = Field(
        None,
        description="Ray's dashboard as this machine reaches it, for ./hitl deploy to a cluster elsewhere. Default: its "
        "port on HITL_HOST.",
    )
    serve_url: HttpAddress | None = Field(
        None,
        description="The service's port as this machine reaches it, for a cluster elsewhere, without /claude-hitl. Default: "
        "its port on HITL_HOST.",
    )
    ray_address: RayAddress | None = Field(
        None,
        description="Ray Client as this machine reaches it, as ray://HOST:PORT, for ./hitl shell. Default: its port on "
        "HITL_HOST.",
    )

    ray_token: RayToken | None = Field(
        None,
        description="Token that Ray's ports require. Default: generated at the first start and kept in the data folder; "
        "for a cluster elsewhere, ./hitl status --show-secrets there shows it.",
    )

    api_key: SecretStr | None = Field(
        None, description="The first API key. Default: one is generated and shown once."
    )
    anthropic_api_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("ANTHROPIC_API_KEY"),
        description="Key for the model. Without one, the offline model answers.",
    )
    anthropic_base_url: str = Field(
        "https://api.anthropic.com",
        validation_alias=AliasChoices("ANTHROPIC_BASE_URL"),
        description="URL of the model's API.",
    )
    model: str = Field(
        "default", description='Model of the default agent; "default" leaves the choice to the CLI.'
    )

    hot_window_s: Seconds = Field(
        60.0, description="How long a waiting call keeps its process before it is parked. 0: park at once."
    )
    idle_timeout_s: Seconds = Field(600.0, description="How long an idle session keeps its process.")
    approval_ttl_s: Seconds | None = Field(
        None, description="After this time an undecided call is denied. Default: never."
    )
    asks_per_minute: int = Field(
        20, ge=1, description="Calls of a session that may begin to wait for a human within a minute."
    )
    asks_per_session: int = Field(
        200,
        ge=1,
        description="Calls of a session that may wait for a human between two messages. Above a limit the session rests.",
    )
    max_recoveries: int = Field(
        5, ge=0, description="How often in a row a turn is resumed after its process died."
    )
    session_cpus: float = Field(
        0.25, gt=0, le=64, description="Share of a CPU that Ray reserves for an awake session."
    )
    session_memory_bytes: int = Field(
        1024**3,
        ge=256 * 1024**2,
        description="Memory that Ray reserves for an awake session. One that uses more is stopped with a reason.",
    )
    session_processes: int = Field(
        256,
        ge=8,
        description="Processes that an awake session may have. One that has more is stopped with a reason.",
    )
    session_open_files: int = Field(
        4096, ge=256, description="Files that each process of a sandbox may have open at once."
    )
    session_disk_bytes: int = Field(
        10 * 1024**3,
        ge=64 * 1024**2,
        description="What an awake session's workspace and temporary files may take of the disk, and its largest file. One "
        "that takes more is stopped with a reason.",
    )
    spare_owners: int = Field(
        1,
        ge=0,
        le=64,
        description="Idle owner processes kept ready for the next session that wakes (20 MB each, or 100 where they are not "
        "forked); a start then takes half a second instead of one and a half. For five minutes after a new session one of "
        "them also has the CLI of the next one ready (130 MB).",
    )
    start_timeout_s: Seconds = Field(
        60.0,
        description="How long a session's process or container may take to start before its turn ends with a reason.",
    )
    cli_path: Path | None = Field(
        None, description="Claude Code CLI to run. Default: the one inside claude-agent-sdk."
    )

    policy: Path | None = Field(
        None,
        description="YAML or JSON file with rules that apply in addition to every agent's policy (docs/security.md). "
        "Default: calls that write, run or reach other machines ask. Read when the service starts.",
    )
    sandbox: Literal["on", "off"] = Field(
        "on",
        description="off: sessions run without a sandbox, and an agent's commands have all permissions of the service. For "
        "experiments only.",
    )
    sandbox_read: str = Field(
        "",
        description="Folders and files that sandboxes may read in addition to the system's, separated by colons: your "
        "own toolchain, for instance. They must not hold secrets.",
    )
    sandbox_write: str = Field(
        "", description="Folders and files that all sandboxes may write: a folder that sessions share."
    )
    credentials: Path | None = Field(
        None,
        description="JSON file, mode 0600, with credentials that the proxy adds to requests of sandboxes. See "
        "docs/security.md.",
    )
    turn_requests: int = Field(2000, ge=1, description="Requests to the model that one turn may make.")
    turn_model_bytes: int = Field(
        4 * 1024**3,
        ge=1024**2,
        description="Bytes that one turn may exchange with the model, requests and responses together.",
    )

    container_image_uri: ImageReference | None = Field(
        None,
        validation_alias=AliasChoices("CONTAINER_IMAGE_URI"),
        description="Image of the default environment, preferably with its digest (./hitl image build prints it): each "
        "session gets its own container. Default: sessions are local processes.",
    )
    private_hosts: Annotated[str, AfterValidator(_host_entries)] = Field(
        "",
        description="Hosts on this machine or in a private network that sessions of the default environment reach without "
        "asking, MCP servers among them: localhost:9000, separated by commas; names, *.domains or addresses, with :PORT if "
        "the port is neither 80 nor 443. Other environments list theirs in HITL_ENVIRONMENTS. See docs/security.md.",
    )
    environments: dict[EnvironmentId, EnvironmentChoice] = Field(
        default_factory=dict[str, EnvironmentChoice],
        description="Further environments, as JSON by id, each with optional image, name, description and networking: "
        '{"data": {"image": "localhost/claude-hitl-worker:data", "networking": {"type": "limited", "allowed_hosts": '
        '["*.example.org"]}}}. See docs/security.md.',
    )

    files_url: Annotated[str, AfterValidator(_without_credentials)] | None = Field(
        None,
        description="URL of saved workspaces: any that fsspec supports, without credentials. Default: the "
        "folder files in the data folder.",
    )
    max_workspace_bytes: int = Field(
        2 * 1024**3,
        ge=1024,
        description="Largest workspace that is saved. A larger one is reported and stays only on its host.",
    )
    workspace_exclude: str = Field(
        "__pycache__/,.cache/",
        description="Globs of files that are not saved with a workspace, separated by commas: for names, or with a / inside "
        "for paths; ending in / for folders only.",
    )

    panel: bool = Field(
        True,
        description="Whether ./hitl up also starts the panel: spooler and panel, about 400 MB together.",
    )
    panel_hosts: str = Field(
        "",
        description="Further names by which browsers reach the panel, next to this machine's name, addresses and localhost, "
        "separated by commas; with :PORT if the port is not HITL_PANEL_PORT.",
    )
    panel_approvers: str = Field(
        "",
        description="Names of panel roles, separated by commas, that may decide in every session, as operators may; others "
        "may decide in their own.",
    )
    panel_wait_s: Seconds = Field(
        1800.0, description="How long a conversation in the panel stays open without news."
    )

    public_url: HttpAddress | None = Field(
        None,
        description="Address at which browsers reach the service, as https://HOST, without /claude-hitl. Default: the one "
        "that the browser used. Set it behind a proxy that ends TLS or changes the Host header.",
    )
    oidc_issuer: Issuer | None = Field(
        None,
        description="Sign-in provider (OpenID Connect) of the pages that the service serves, as it calls itself. Default: "
        "users sign in with a password. See docs/people.md.",
    )
    oidc_client_id: str | None = Field(None, description="The service's client id at the sign-in provider.")
    oidc_client_secret: SecretStr | None = Field(
        None,
        description="The service's client secret there. Default: none, for a public client, which proves itself by PKCE "
        "only.",
    )
    oidc_scopes: str = Field(
        "openid profile email",
        description="Scopes that are asked for, separated by spaces; some providers have one for groups.",
    )
    oidc_groups_claim: str = Field(
        "groups", min_length=1, description="Claim with the names of the user's groups."
    )
    oidc_roles: Annotated[str, AfterValidator(_group_roles)] = Field(
        "",
        description="Roles that groups give, as GROUP=WORKSPACE:ROLE separated by semicolons: approvers=default:approver;"
        "ops=default:operator. The group * is every user, the workspace * every workspace.",
    )
    max_upload_bytes: int = Field(
        20 * 1024 * 1024,
        ge=1024,
        description="Largest total size of the files uploaded to a conversation in the panel, and of those that a "
        "turn offers there.",
    )

    webhook_private_hosts: Annotated[str, AfterValidator(_host_entries)] = Field(
        "",
        description="Hosts that webhooks may reach at private addresses, and by http: names, *.domains or addresses, "
        "separated by commas; with :PORT if the port is neither 80 nor 443. Default: public addresses only, by https.",
    )
    smtp_url: Annotated[str, AfterValidator(_mail_server)] | None = Field(
        None,
        description="Mail server for notifications, as smtps://USER@HOST or, with STARTTLS, smtp://USER@HOST:587. Default: "
        "no mails. It needs HITL_SMTP_FROM.",
    )
    smtp_password: SecretStr | None = Field(None, description="Password of the user in HITL_SMTP_URL.")
    smtp_from: str | None = Field(
        None, pattern=r"^[^@\s<>,]+@[^@\s<>,]+$", description="Address that notifications by mail come from."
    )
    ingress_replicas: int = Field(1, ge=1, le=64, description="Processes that answer REST requests.")
    max_request_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="Largest request body.")
    requests_per_minute: int = Field(
        1200, ge=1, description="Requests that one API key may make in a minute, per replica."
    )
    log_level: str = Field(
        "INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Level of the service's log."
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_set(cls, given: dict[str, object]) -> dict[str, object]:
        """As `env_ignore_empty` has it for variables: an empty file of a secret is none."""
        return {name: value for name, value in given.items() if value != ""}

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        seen: dict[int, str] = {}
        for name in ("ray_port", "ray_client_port", "dashboard_port", "serve_port", "panel_port"):
            port = getattr(self, name)
            if port in seen:
                raise ValueError(
                    f"{variable(seen[port])} and {variable(name)} are both {port}: the ports must differ"
                )
            seen[port] = name
        return self

    @model_validator(mode="after")
    def _a_provider_knows_the_service(self) -> Self:
        if self.oidc_issuer is not None and not self.oidc_client_id:
            raise ValueError("HITL_OIDC_ISSUER needs HITL_OIDC_CLIENT_ID, the service's client id there")
        return self

    @model_validator(mode="after")
    def _mails_have_a_sender(self) -> Self:
        if self.smtp_url is not None and self.smtp_from is None:
            raise ValueError("HITL_SMTP_URL needs HITL_SMTP_FROM, the address that mails come from")
        return self

    @classmethod
    def load(cls, profile: str | None = None) -> "Settings":
        """With a profile, `profiles/NAME.env` in HITL_HOME wins over `.env`.

        Raises ConfigError that names the variable and the problem, never the value of a secret.
        """
        home = Path(os.environ.get("HITL_HOME") or build_info.started_in()).expanduser().absolute()
        files = [home / ".env", *([profile_file(home, profile)] if profile is not None else [])]
        try:
            settings = cls(_env_file=files, _secrets_dir=_secret_files())  # type: ignore[call-arg]
        except ValidationError as error:
            raise ConfigError(*_explain(error)) from None
        except SettingsError as error:  # a value that should be JSON and is not
            raise ConfigError(*_explain_json(error)) from None
        # One folder has one name, whatever links lead to it: what runs on it is known by that name.
        data_dir = Path(os.path.realpath(home / settings.data_dir.expanduser()))
        return settings.model_copy(update={"home": home, "data_dir": data_dir})

    def text(self, name: str) -> str | None:
        """A field's value as text of its variable; None if it is not set."""
        value = self.model_dump(mode="json")[name]
        return value if value is None else json.dumps(value) if isinstance(value, dict) else str(value)

    def floor(self) -> Floor:
        """The policy that applies under every agent's own. Raises ConfigError."""
        return read_floor(self.policy and self.home / self.policy.expanduser())

    def all_environments(self) -> dict[str, Environment]:
        """The environments that a session may name, by id; the first is the default."""
        found = {"default": EnvironmentChoice(image=self.container_image_uri)} | self.environments
        found["default"] = found["default"].reaching(_entries(self.private_hosts))
        return {id_: _environment(id_, choice) for id_, choice in found.items()}

    @property
    def images(self) -> tuple[str, ...]:
        """The images of the environments, each once; the default environment's first."""
        found = (environment.image for environment in self.all_environments().values())
        return tuple(dict.fromkeys(image for image in found if image is not None))

    # -- places in the data folder

    @property
    def database_path(self) -> Path:
        return self.data_dir / "hitl.sqlite3"

    @property
    def postgres_dir(self) -> Path:
        """The folder of the local Postgres, if `up --postgres` made one."""
        return self.data_dir / "postgres"

    @property
    def workspaces(self) -> Path:
        return self.data_dir / "workspaces"

    @property
    def markers(self) -> Path:
        """The base state of each folder in `workspaces`, kept outside of them."""
        return self.data_dir / "saved"

    @property
    def files_at(self) -> str:
        return self.files_url or (self.data_dir / "files").as_uri()

    @property
    def excluded(self) -> tuple[str, ...]:
        return tuple(glob.strip() for glob in self.workspace_exclude.split(",") if glob.strip())

    @property
    def sandbox_readable(self) -> tuple[Path, ...]:
        return _paths(self.sandbox_read)

    @property
    def sandbox_writable(self) -> tuple[Path, ...]:
        return _paths(self.sandbox_write)

    @property
    def secrets_dir(self) -> Path:
        return self.data_dir / "secrets"

    @property
    def logs_dir(self) -> Path:
        return self.data_dir / "logs"

    @property
    def panel_dir(self) -> Path:
        return self.data_dir / "panel"

    @property
    def webhook_hosts(self) -> tuple[str, ...]:
        return _entries(self.webhook_private_hosts)

    @property
    def approvers(self) -> frozenset[str]:
        return frozenset(name.strip() for name in self.panel_approvers.split(",") if name.strip())

    @property
    def base_url(self) -> str:
        """Where clients on this machine reach the service."""
        return f"http://{self.local_host}:{self.serve_port}/claude-hitl"

    @property
    def pages_url(self) -> str:
        """Where browsers reach the pages of the service."""
        return f"{self.public_url}/claude-hitl" if self.public_url else self.base_url

    @property
    def service_url(self) -> str:
        """Where this machine reaches the service, which may run on another one."""
        return f"{self.serve_url}/claude-hitl" if self.serve_url else self.base_url

    @property
    def dashboard(self) -> str:
        """Where this machine reaches Ray's dashboard."""
        return self.dashboard_url or self.own_dashboard

    @property
    def own_dashboard(self) -> str:
        """Where this machine reaches the dashboard of the Ray that it runs itself."""
        return f"http://{self.local_host}:{self.dashboard_port}"

    @property
    def ray_client(self) -> str:
        """Where this machine reaches Ray Client."""
        return self.ray_address or f"ray://{self.local_host}:{self.ray_client_port}"

    @property
    def panel_url(self) -> str:
        """Where browsers on this machine, and the service, reach the panel."""
        return f"http://{self.local_host}:{self.panel_port}"

    @property
    def panel_at(self) -> str:
        """Where this machine's user reaches the panel: it is on the service's host, which may be another one."""
        host = (urlsplit(self.serve_url).hostname if self.serve_url else None) or self.local_host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.panel_port}"

    @property
    def local_host(self) -> str:
        """Where this machine reaches what listens on HITL_HOST."""
        return LOOPBACK if self.host == "0.0.0.0" else self.host  # noqa: S104


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(one).expanduser() for one in text.split(":") if one)


def profile_file(home: Path, name: str) -> Path:
    """Raises ConfigError for a profile that is not there."""
    folder = home / "profiles"
    there = sorted(path.stem for path in folder.glob("*.env"))
    if name in there:
        return folder / f"{name}.env"
    known = f"there are: {', '.join(there)}" if there else "there are none"
    raise ConfigError(
        f"there is no profile {name!r} in {folder} ({known})",
        f"copy {folder / 'vm.env.example'} to {folder}/NAME.env and correct it",
    )


def variable(name: str) -> str:
    """The environment variable of a field."""
    alias = Settings.model_fields[name].validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"HITL_{name.upper()}"


def _environment(id_: str, choice: EnvironmentChoice) -> Environment:
    local = Environment()
    if choice.image is None:
        default_name, description = local.name, local.description
    else:
        default_name, description = (
            "Container",
            f"A container of {choice.image}, of its own for each session.",
        )
    name = choice.name or (default_name if id_ == "default" else id_)
    return Environment(
        id=id_,
        name=name,
        description=choice.description or description,
        image=choice.image,
        networking=choice.networking,
    )


def _explain_json(error: SettingsError) -> tuple[str, str]:
    name = next((name for name in Settings.model_fields if f'"{name}"' in str(error)), "")
    shown = variable(name) if name else "a setting"
    return (
        f"{shown} is not usable: it is not JSON",
        f"correct {shown} in the environment or in .env (see .env.example)",
    )


def _explain(error: ValidationError) -> tuple[str, str]:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    shown = name if name.isupper() else variable(name) if name in Settings.model_fields else "settings"
    why = first["msg"].removeprefix("Value error, ")
    if not name:  # of several together, which it names
        return why, "correct one of them in the environment or in .env (see .env.example)"
    return (
        f"{shown} is not usable: {why}",
        f"correct {shown} in the environment or in .env (see .env.example)",
    )
