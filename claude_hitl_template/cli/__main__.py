"""`python -m claude_hitl_template.cli`, which `./hitl` runs."""

import sys

from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.run import run

if __name__ == "__main__":
    sys.exit(run(app))
