"""How this command is called and where it keeps its data: in a checkout, or installed as a package."""

import os
from pathlib import Path

from claude_hitl_template.errors import ConfigError

ROOT = Path(__file__).parents[2]
IN_CHECKOUT = (ROOT / "hitl").is_file()
NAME = "./hitl" if IN_CHECKOUT else "hitl"


def named(text: str) -> str:
    """Text for a user, in which commands are called as this one was."""
    return text if IN_CHECKOUT else text.replace("./hitl", NAME)


def launcher(root: Path) -> Path:
    """The `hitl` of the code in `root`, which is a checkout, or the site-packages of an environment."""
    return root.parents[2] / "bin" / "hitl" if root.name == "site-packages" else root / "hitl"


def choose_home() -> None:
    """Without a checkout, `.env` and the data folder are in the user's folder for data, unless HITL_HOME is set."""
    if not IN_CHECKOUT and not os.environ.get("HITL_HOME"):
        from platformdirs import user_data_path  # noqa: PLC0415  (a checkout needs none)

        os.environ["HITL_HOME"] = str(user_data_path("claude-hitl"))


def need_checkout(command: str) -> None:
    """Raises ConfigError where the package was installed: `command` works on the files of a checkout."""
    if not IN_CHECKOUT:
        raise ConfigError(
            f"hitl {command} works on the files of a checkout, and this is an installed package",
            "clone the project's repository, and run the command of the same name in it",
        )
