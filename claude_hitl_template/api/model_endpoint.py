"""The application under /model: the model endpoint behind session tokens."""

from fastapi import FastAPI

from claude_hitl_template.api import problems
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.errors import NotFound, Unauthorized
from claude_hitl_template.model import tokens
from claude_hitl_template.model.endpoint import Upstream, build_router
from claude_hitl_template.store.protocol import Clients


def build_model_app(upstream: Upstream, store: Clients, signing_key: SigningKey) -> FastAPI:
    """The endpoint in front of `upstream`. A token opens it as long as its session's lease has the token's epoch."""

    async def verify(token: str) -> None:
        session_id, epoch = tokens.check(signing_key.secret, token)
        try:
            lease = (await store.get_session(session_id)).lease
        except NotFound:
            lease = None
        if lease is None or lease.epoch != epoch:
            raise Unauthorized("another process drives this session now")

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(build_router(upstream, verify))
    problems.install_bare(app)
    return app
