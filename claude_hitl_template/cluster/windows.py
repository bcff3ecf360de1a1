"""The panel's windows: the flow that shows one session, in a Kodosumi runner of its own on any host of the cluster."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from claude_hitl_template.cluster import kodosumi
from claude_hitl_template.cluster.ledger_line import APP_NAME, SUPERVISOR, Line, reach
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import ImageFacts
from claude_hitl_template.store.protocol import Windows

FACTS_S = 5.0


def window(capability: str, *, free: bool) -> Callable[..., Any]:
    """The flow that the panel's entries launch.

    `free`: the offline model answers. The capability is bound as an argument of the function: the panel shows a flow's
    inputs and its function's name.
    """
    flow = functools.partial(mirror_session, capability=capability, free=free)
    flow.__module__, flow.__name__ = __name__, mirror_session.__name__  # pyright: ignore[reportAttributeAccessIssue]
    return flow


async def mirror_session(
    inputs: dict[str, Any], tracer: Any, *, capability: str | None = None, free: bool = False
) -> Any:
    """Shows one session in the panel. Runs in a Kodosumi runner, on any host of the cluster."""
    from claude_hitl_template.panel import flow  # noqa: PLC0415
    from claude_hitl_template.panel.services import WindowServices  # noqa: PLC0415

    settings = Settings.load()
    services = WindowServices(
        store=reach(Windows, Line(), capability),
        image_facts=image_facts,
        wait_s=settings.panel_wait_s,
        max_upload_bytes=settings.max_upload_bytes,
        pages_url=settings.pages_url,
        free=free,
    )
    return await flow.mirror(inputs, tracer, services, kodosumi.RunnerLocks(tracer.fid))


async def image_facts(image: str) -> ImageFacts | None:
    """Asks the supervisor for the facts of an image; None if it has none or does not answer."""
    supervisor: Any = serve.get_deployment_handle(SUPERVISOR, APP_NAME).options(_by_reference=False)
    try:
        return await asyncio.wait_for(supervisor.image_facts.remote(image), FACTS_S)
    except (RayError, RayServeException, TimeoutError):
        return None
