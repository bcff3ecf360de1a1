"""gRPC's connections never use a proxy of the environment: all of Ray's lead into the cluster."""

import os

# gRPC reads `grpc_proxy` first; empty, it reaches everything directly.
GRPC = {"grpc_proxy": "", "RAY_grpc_enable_http_proxy": "0"}


def keep_direct() -> None:
    """Makes gRPC bypass proxies in this process and its children."""
    os.environ.update(GRPC)
