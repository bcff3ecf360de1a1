"""Entry point of `./hitl chaos`: makes one run, prints its table and writes its report. Exits with 1 if a promise broke."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from claude_hitl_template.errors import HitlError
from tests.chaos.run import Choice, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="./hitl chaos")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--postgres", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hitl-chaos-"))
    folder.chmod(0o711)  # root's Postgres runs as another user
    try:
        report = run(Choice(given.minutes, given.kills, given.seed, given.postgres), folder)
    except HitlError as error:
        print(f"error: {error}\n  What there is of it is in {folder}", file=sys.stderr)
        return 1
    if given.report is not None:
        given.report.write_text(report.as_json() + "\n")
    Console(highlight=False).print(report.table())
    for broken in [*report.violations, *report.unanswered]:
        print(broken)
    if not report.kept:
        print(
            f"PROMISES WERE BROKEN. Seed {given.seed}; the store's backup, journal and logs are in {folder}"
        )
        return 1
    shutil.rmtree(folder)
    print(f"every promise was kept (seed {given.seed})")
    return 0


sys.exit(main())
