"""The Ray Serve deployments that make up the application: ledger, supervisor and ingress.

The driver and every replica import this module, so it holds what all of them need; a replica imports the rest when it
is made. On a small machine these imports are most of a start, and an unused module stays in memory.
"""

import asyncio
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from claude_hitl_template import code_version
from claude_hitl_template.cluster.ledger import LedgerService
from claude_hitl_template.cluster.ledger_line import SUPERVISOR, Line, reach
from claude_hitl_template.config import logs
from claude_hitl_template.config.secret_files import read_signing_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import ImageFacts
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.access import Authority
from claude_hitl_template.store.protocol import Supervision

IMAGE_S = 3.0  # if podman takes longer, its last answer is used
_LIGHT: dict[str, Any] = {
    "num_cpus": 0,  # by default Serve reserves a CPU for each replica; on a small machine no session could start then
    # The data folder with database and secrets is on the head; another host would create a new one.
    "resources": {"node:__internal_head__": 0.001},
}
_STREAMS = 10_000  # concurrent requests per replica; each event stream is one
_NO_ACCESS_LOG: dict[str, Any] = {"enable_access_log": False}


@serve.deployment(
    name="Ledger",
    max_ongoing_requests=_STREAMS,
    ray_actor_options=_LIGHT,
    logging_config=_NO_ACCESS_LOG,  # one line for each call of the Store would be noise
)
class Ledger(LedgerService):
    """The deployment of `LedgerService`: one replica on SQLite, any number on Postgres."""


@serve.deployment(name=SUPERVISOR, num_replicas=1, max_ongoing_requests=100, ray_actor_options=_LIGHT)
class SupervisorService:
    """Runs the supervisor, with owners as Ray actors, and the courier; and reports facts about images."""

    def __init__(self, ledger: Any) -> None:
        from claude_hitl_template.cluster.containers import Preflight  # noqa: PLC0415  (see above)
        from claude_hitl_template.cluster.ray_host import RayOwnerHost  # noqa: PLC0415
        from claude_hitl_template.cluster.supervisor import Supervisor  # noqa: PLC0415
        from claude_hitl_template.notify.courier import Courier  # noqa: PLC0415
        from claude_hitl_template.notify.senders import build_senders  # noqa: PLC0415
        from claude_hitl_template.store.notifying import Couriers  # noqa: PLC0415

        self._settings = settings = Settings.load()
        logs.configure(settings.log_level)
        signing_key, to_ledger = read_signing_key(settings), Line(ledger)
        self._preflight = Preflight()
        self._supervisor = Supervisor(
            settings,
            reach(Supervision, to_ledger, Authority(signing_key).supervisor()),
            RayOwnerHost(settings, self._preflight, to_ledger),
            signing_key,
            environments=settings.all_environments(),
            floor=settings.floor(),
        )
        self._supervisor.start()
        self._courier = Courier(
            reach(Couriers, to_ledger, Authority(signing_key).courier()),
            build_senders(settings),
            pages_url=settings.pages_url,
        )
        self._courier.start()

    async def drain(self, grace_s: float) -> int:
        """See `Supervisor.drain`."""
        return await self._supervisor.drain(grace_s)

    async def undrain(self) -> None:
        """See `Supervisor.undrain`."""
        await self._supervisor.undrain()

    async def drained_s(self) -> float:
        """See `Supervisor.drained_s`."""
        return await self._supervisor.drained_s()

    async def image_facts(self, image: str) -> ImageFacts | None:
        """Returns the facts of the image on this machine; if podman does not answer in time, those of its last answer.

        Returns:
            None if the image is missing, cannot be used, or is not known yet.
        """
        if image not in self._settings.images:
            return None
        checking = asyncio.create_task(asyncio.to_thread(self._preflight.check, image))
        # It may end after the caller has gone, and then its exception would count as never retrieved.
        checking.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            return await asyncio.wait_for(asyncio.shield(checking), IMAGE_S)
        except TimeoutError:
            return self._preflight.last(image)
        except ConfigError:
            return None

    def check_health(self) -> None:
        """Called by Serve. Raises RuntimeError when the supervisor or the courier has stopped."""
        self._supervisor.check_health()
        self._courier.check_health()


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=_STREAMS,
    ray_actor_options=_LIGHT,
    logging_config=_NO_ACCESS_LOG,  # with_request_ids logs each request with its id
)
@serve.ingress()  # pyright: ignore[reportUntypedClassDecorator]
class Ingress:
    """REST, event streams, the model endpoint, and the panel's entries. Stateless."""

    def __init__(self, ledger: Any, supervisor: Any) -> None:
        from claude_hitl_template.cluster.ingress import IngressService  # noqa: PLC0415  (see above)

        self._service = IngressService(ledger, supervisor)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve once the replica is made, so that nothing of the application is pickled."""
        return self._service.app

    async def reconfigure(self, _user_config: Any) -> None:
        """Called by Serve before the replica gets requests, and at each deploy."""
        await self._service.take_first_key()
        self._service.open()

    async def __del__(self) -> None:
        """Called by Serve once the replica gets no more requests."""
        if hasattr(self, "_service"):
            await self._service.close()


def build(settings: Settings) -> Any:
    """The application, bound for Serve."""
    if settings.ledger_replicas > 1:
        from claude_hitl_template.store.connect import check_replicas  # noqa: PLC0415  (needs a database's libraries)

        check_replicas(settings)
    ledger = Ledger.options(num_replicas=settings.ledger_replicas).bind()
    supervisor = SupervisorService.bind(ledger)
    ingress = Ingress.options(num_replicas=settings.ingress_replicas, user_config={"code": code_version()})
    return ingress.bind(ledger, supervisor)
