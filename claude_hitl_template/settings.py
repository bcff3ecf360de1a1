"""The only reader of the environment. Every field is one variable `HITL_<NAME>`, or the alias it names.

Sources, first wins: the environment, `.env` in HITL_HOME, the default here.
"""

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import AliasChoices, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from claude_hitl_template.errors import ConfigError

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(ge=0, le=10 * 365 * 86400)]


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
        description="Folder of .env, and what a relative HITL_DATA_DIR starts from. ./hitl: its own; else the current one.",
    )
    data_dir: Path = Field(
        Path(".hitl"), description="Folder of everything that lasts: database, workspaces, keys, logs."
    )
    host: str = Field("127.0.0.1", description="Address that the ports below listen on.")
    ray_port: Port = Field(6379, description="Ray's GCS.")
    ray_client_port: Port = Field(10001, description="Ray Client.")
    dashboard_port: Port = Field(8265, description="Ray's dashboard.")
    serve_port: Port = Field(8001, description="The REST API, under /claude-hitl.")
    panel_port: Port = Field(3370, description="Kodosumi's panel: conversations and approvals in a browser.")
    ray_temp_dir: Path | None = Field(
        None,
        description="Ray's own temporary files. Default: a folder under /tmp named after the data folder.",
    )
    ray_num_cpus: int | None = Field(
        None, ge=1, description="CPUs that Ray may plan with. Default: all of the machine's."
    )

    api_key: SecretStr | None = Field(
        None, description="The first API key. Default: one is made, and shown once."
    )
    anthropic_api_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("ANTHROPIC_API_KEY"),
        description="Key for the model. Without one, the offline model answers.",
    )
    anthropic_base_url: str = Field(
        "https://api.anthropic.com",
        validation_alias=AliasChoices("ANTHROPIC_BASE_URL"),
        description="Where the model is.",
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
    max_recoveries: int = Field(
        5, ge=0, description="How often in a row a turn is taken up again after its process died."
    )
    session_cpus: float = Field(
        0.05, gt=0, le=64, description="Share of a CPU that Ray sets aside for an awake session."
    )
    spare_owners: int = Field(
        1,
        ge=0,
        le=64,
        description="Processes kept started for the next session that wakes (about 100 MB each); it then takes a "
        "second instead of four.",
    )
    start_timeout_s: Seconds = Field(
        60.0, description="How long a session may wait for room before its turn ends with a reason."
    )
    cli_path: Path | None = Field(
        None, description="Claude Code CLI to run. Default: the one inside claude-agent-sdk."
    )

    panel: bool = Field(
        True,
        description="Whether ./hitl up starts the panel too: spooler and panel, about 400 MB together.",
    )
    panel_approvers: str = Field(
        "",
        description="Names of panel roles, with commas between them, that may decide in every session, as operators may; "
        "others may in their own.",
    )
    panel_wait_s: Seconds = Field(
        1800.0, description="How long a conversation in the panel stays open with nothing new in it."
    )

    max_upload_bytes: int = Field(
        20 * 1024 * 1024,
        ge=1024,
        description="Largest size, together, of files uploaded to a conversation in the panel, and of those that a turn "
        "offers there.",
    )

    ingress_replicas: int = Field(1, ge=1, le=64, description="Processes that answer REST requests.")
    max_request_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="Largest request body.")
    requests_per_minute: int = Field(
        1200, ge=1, description="Requests that one API key may make in a minute, per replica."
    )
    log_level: str = Field(
        "INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="How much the service writes to its log."
    )

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = {
            name: getattr(self, name)
            for name in ("ray_port", "ray_client_port", "dashboard_port", "serve_port", "panel_port")
        }
        if len(set(ports.values())) != len(ports):
            raise ValueError(f"the ports must differ: {ports}")
        return self

    @classmethod
    def load(cls) -> "Settings":
        """Raises ConfigError that names the variable and what is wrong with it, never its value if it is a secret."""
        try:
            home = Path(os.environ.get("HITL_HOME") or ".").expanduser().absolute()
            settings = cls(_env_file=home / ".env")  # type: ignore[call-arg]
        except ValidationError as error:
            raise ConfigError(*_explain(error)) from None
        return settings.model_copy(update={"home": home, "data_dir": home / settings.data_dir.expanduser()})

    # -- places in the data folder

    @property
    def database_path(self) -> Path:
        return self.data_dir / "hitl.sqlite3"

    @property
    def workspaces(self) -> Path:
        return self.data_dir / "workspaces"

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
    def approvers(self) -> frozenset[str]:
        return frozenset(name.strip() for name in self.panel_approvers.split(",") if name.strip())

    @property
    def base_url(self) -> str:
        """Where clients on this machine reach the service."""
        return f"http://{self._local_host}:{self.serve_port}/claude-hitl"

    @property
    def panel_url(self) -> str:
        """Where browsers on this machine, and the service, reach the panel."""
        return f"http://{self._local_host}:{self.panel_port}"

    @property
    def _local_host(self) -> str:
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104


def variable(name: str) -> str:
    """The environment variable of a field."""
    alias = Settings.model_fields[name].validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"HITL_{name.upper()}"


def _explain(error: ValidationError) -> tuple[str, str]:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    shown = name if name.isupper() else variable(name) if name in Settings.model_fields else "settings"
    return (
        f"{shown} is not usable: {first['msg']}",
        f"correct {shown} in the environment or in .env (see .env.example)",
    )
