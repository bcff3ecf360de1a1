"""Serve ignores unknown keys of a config, so a deployed config must not have any; nor does it contain a secret."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from claude_hitl_template.cli.deploy import serve_config
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Networking
from claude_hitl_template.errors import ConfigError

SHIPPED = Path(__file__).parents[3] / "data" / "config"
OURS = "claude_hitl_template.yaml"
# Ray's own schemas are written for an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
type Make = Callable[..., Settings]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copies of the shipped files, which tests change."""
    made = tmp_path / "config"
    made.mkdir()
    for path in SHIPPED.glob("*.yaml"):
        (made / path.name).write_text(path.read_text())
    return made


def change(path: Path, **said: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **said}))


def test_what_is_shipped_is_good(folder: Path) -> None:
    assert set(serve_config.read(folder)) == {"config.yaml", OURS}


@pytest.mark.parametrize(
    ("file", "said", "place"),
    [
        ("config.yaml", {"http_option": {}}, "http_option"),
        ("config.yaml", {"http_options": {"prot": 1}}, "http_options.prot"),
        (OURS, {"rout_prefix": "/x"}, "rout_prefix"),
        (OURS, {"deployments": [{"name": "Ledger"}, {"name": "Ingress", "num_replica": 2}]}, "deployments[1].num_replica"),
        (OURS, {"deployments": [{"name": "x", "ray_actor_options": {"cpus": 1}}]}, "deployments[0].ray_actor_options.cpus"),
        (OURS, {"runtime_env": {"env_var": {}}}, "runtime_env.env_var"),
        (OURS, {"deployments": [{"name": "x", "ray_actor_options": {"runtime_env": {"pips": []}}}]}, "runtime_env.pips"),
    ],
)  # fmt: skip
def test_a_key_that_would_be_ignored_is_named_with_its_file(
    folder: Path, file: str, said: dict[str, Any], place: str
) -> None:
    change(folder / file, **said)
    with pytest.raises(ConfigError) as raised:
        serve_config.read(folder)
    assert f"{folder / file}: {place} is not a key" in str(raised.value)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"import_path": "nothing"}, "import_path"),
        ({"deployments": [{"name": "x", "num_replicas": "many"}]}, "num_replicas"),
        ({"runtime_env": {"working_dir": "/home/me/code"}}, "runtime_env"),
        ({"runtime_env": {"env_vars": {"ANTHROPIC_API_KEY": "x"}}}, "everyone on the cluster can read"),
        ({"name": "other"}, "name: claude-hitl"),
        ({"port": 8001}, "Port 8001"),
    ],
)
def test_a_value_that_serve_would_refuse_is_named_here(
    folder: Path, said: dict[str, Any], named: str
) -> None:
    change(folder / OURS, **said)
    with pytest.raises(ConfigError, match=named):
        serve_config.read(folder)


@pytest.mark.parametrize("text", ["a: [", "- x", "", "\t\0", "just text"])
def test_a_file_that_is_no_yaml_of_keys_is_named(folder: Path, text: str) -> None:
    (folder / "other.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"other\.yaml"):
        serve_config.read(folder)


def test_without_the_main_file_it_says_so(folder: Path) -> None:
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml is not there"):
        serve_config.read(folder)


def test_the_package_goes_into_our_application_and_what_stands_there_stays(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "other.yaml").write_text("name: other\nroute_prefix: /other\nimport_path: a:b\n")
    files = serve_config.complete(
        serve_config.read(folder),
        uri="gcs://p.zip",
        variables={"HITL_MODEL": "m"},
        http={"host": "::1", "port": 9},
    )
    main = serve_config.write(files, tmp_path / "made")
    written = {path.name: yaml.safe_load(path.read_text()) for path in main.parent.iterdir()}
    assert written == files
    assert written["config.yaml"]["http_options"] == {"host": "::1", "port": 9}
    shipped = serve_config.read(folder)[OURS]["runtime_env"]["env_vars"]
    assert shipped
    assert written[OURS]["runtime_env"] == {
        "working_dir": "gcs://p.zip",
        "env_vars": {**shipped, "HITL_MODEL": "m"},
    }
    assert "runtime_env" not in written["other.yaml"]
    assert main.parent.stat().st_mode & 0o077 == 0
    (main.parent / "left.yaml").write_text("name: left")
    assert not (serve_config.write(files, main.parent).parent / "left.yaml").exists()


def test_chosen_settings_travel_but_no_secret_and_nothing_of_this_machine(make_settings: Make) -> None:
    settings = make_settings(
        hot_window_s=5, container_image_uri="localhost/w:1", environments='{"d": {"image": "localhost/w:2"}}',
        api_key="secret-one", anthropic_api_key="secret-two", serve_port=9001, host="0.0.0.0", cli_path="/x",
        dashboard_url="http://h:1",
    )  # fmt: skip
    assert serve_config.travelling(settings) == {
        "HITL_HOT_WINDOW_S": "5.0",
        "CONTAINER_IMAGE_URI": "localhost/w:1",
        "HITL_ENVIRONMENTS": json.dumps(
            {
                "d": {
                    "name": None,
                    "description": None,
                    "image": "localhost/w:2",
                    "networking": Networking().model_dump(),
                }
            }
        ),
    }


@pytest.mark.parametrize("value", ["a'; touch x; '", "two\nlines", "\x1b[2J"])
def test_a_value_that_would_break_out_of_rays_shell_command_does_not_travel(
    make_settings: Make, value: str
) -> None:
    with pytest.raises(ConfigError, match="HITL_MODEL holds a quote or a control character"):
        serve_config.travelling(make_settings(model=value))


def test_a_secret_in_the_files_is_found_and_not_repeated(folder: Path) -> None:
    change(folder / OURS, args={"x": "my-secret-value"})
    with pytest.raises(ConfigError, match="holds a secret") as raised:
        serve_config.check_no_secret(serve_config.read(folder), ["", "my-secret-value"])
    assert "my-secret-value" not in str(raised.value)
