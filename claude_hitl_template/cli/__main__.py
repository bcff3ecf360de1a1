"""`python -m claude_hitl_template.cli`, which `./hitl` runs, and `hitl` of an installed package."""

import sys

from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.program import choose_home
from claude_hitl_template.cli.run import run


def main() -> int:
    """Runs the command line and returns its exit status."""
    choose_home()
    return run(app)


if __name__ == "__main__":
    sys.exit(main())
