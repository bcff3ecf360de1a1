"""Human-approved Claude sessions on your own Ray cluster."""

import os
from hashlib import sha256
from pathlib import Path

__version__ = "0.1.0"

# Ray Serve reads it once, when it is imported, in the process that calls as in the one that answers. Its own limit of
# 4 MiB is less than one request may have. Calls above the limit take a slower way (cluster/ledger.py).
GRPC_LIMIT = ("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(64 * 1024 * 1024))
os.environ.setdefault(*GRPC_LIMIT)

CODE_SUFFIXES = (".py", ".yaml", ".sh", ".j2", ".css", ".js")  # of the files that `code_version` counts


def code_version(folder: Path = Path(__file__).parent) -> str:
    """12 hexadecimal characters over a package's files, by default this one's: whether a running service is this code."""
    code = sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in CODE_SUFFIXES:
            code.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return code.hexdigest()[:12]
