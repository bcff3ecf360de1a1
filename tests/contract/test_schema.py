"""Valid and invalid requests generated from the OpenAPI document are answered as the document says.

`--scale 2000` makes 20,000 of them. test_bad_input.py tests each route without a key.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.schemas import APIOperation, BaseSchema

from claude_hitl_template.api import openapi
from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.testing.local_service import OPERATOR_KEY
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.contract.routes import OPERATIONS, parameters
from tools.bench.parked_load import Waiting, make_parked_load

KEY = "key-of-the-schema-tests"
WAIT_S = 60.0
# A stream has no end: it is read for so long, and what came by then is judged. Longer where it did not even begin.
STREAM_S = (0.2, 5.0, WAIT_S)
CROWD = 40  # parked sessions with calls that wait, which requests may do anything to
CHECKS = {
    "enabled": False,
    **{
        name: {"enabled": True}
        for name in (
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_headers_conformance",
            "response_schema_conformance",
            "unsupported_method",
        )
    },
    # Of its own it takes a 413 for an acceptance. Which refusals a route may give, status_code_conformance looks at.
    "negative_data_rejection": {"enabled": True, "expected-statuses": ["4xx"]},
}


@pytest.fixture(scope="module")
def parked_sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Threaded, list[Waiting]]]:
    """A service that drives no sessions, and sessions in it that wait for decisions."""
    folder = tmp_path_factory.mktemp("schema")
    at = Settings.load().model_copy(update={"data_dir": folder, "database_url": None})
    made = asyncio.run(make_parked_load(at, hash_api_key(KEY), CROWD))
    with serve_in_thread(folder, keys={"first key": KEY}, driving=False) as served:
        yield served, made


@pytest.fixture(scope="module")
def document(parked_sessions: tuple[Threaded, list[Waiting]]) -> BaseSchema:
    """The service's document, with the internal routes that it does not publish."""
    raw = openapi.describe(parked_sessions[0].service.app)
    return schemathesis.openapi.from_dict(raw, config=SchemathesisConfig.from_dict({"checks": CHECKS}))


def ids(served: Threaded, made: list[Waiting]) -> dict[str, list[str]]:
    """By path parameter, values that exist."""
    url = f"{served.service.url}/v1/approvals"
    found = requests.get(url, headers={"x-api-key": KEY}, params={"limit": 1000}, timeout=WAIT_S).json()
    return {
        "session_id": [waiting.session_id for waiting in made],
        "approval_id": [approval["id"] for approval in found["data"]],
        "agent_id": ["default"],
        "environment_id": ["default"],
        "name": ["anthropic-api-key"],
    }


def cases(operation: APIOperation, known: dict[str, list[str]]) -> st.SearchStrategy[Any]:
    """Generates valid and invalid requests. Half of those with ids in the path use existing ones."""
    modes = [GenerationMode.POSITIVE]
    if _varies(operation.label):
        modes.append(GenerationMode.NEGATIVE)
    names = [name for name in known if f"{{{name}}}" in operation.path]
    plain = [operation.as_strategy(mode) for mode in modes]
    fitting = [
        operation.as_strategy(mode, path_parameters={name: value})
        for mode in modes
        for name in names
        for value in known[name]
    ]
    return st.one_of(st.one_of(plain), st.one_of(fitting)) if fitting else st.one_of(plain)


def _varies(route: str) -> bool:
    """Whether a request has any part other than an id that can be invalid."""
    return "requestBody" in OPERATIONS[route] or bool(parameters(route) + parameters(route, "header"))


def _streams(route: str) -> bool:
    return "text/event-stream" in OPERATIONS[route]["responses"]["200"]["content"]


def ends_sessions(route: str) -> bool:
    return route.startswith("DELETE") or route.endswith("/archive")


@pytest.mark.parametrize("route", sorted(OPERATIONS, key=ends_sessions))
def test_what_comes_back_is_what_the_document_says(
    route: str, parked_sessions: tuple[Threaded, list[Waiting]], document: BaseSchema, scale: int
):
    served, made = parked_sessions
    method, path = route.split()
    operation = document[path][method]
    patience = STREAM_S if _streams(route) else (WAIT_S,)
    key = OPERATOR_KEY if "/internal/" in path else KEY
    varied = sum("{" in one or _varies(one) for one in OPERATIONS)

    @settings(
        max_examples=10 * scale // varied,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(operation, ids(served, made)))
    def ask(case: Any) -> None:
        for number, timeout_s in enumerate(patience):
            try:
                case.call_and_validate(
                    base_url=served.service.url,
                    session=session,
                    headers={"x-api-key": key},
                    timeout=timeout_s,
                )
            except requests.Timeout:
                if number + 1 == len(patience):
                    raise
            else:
                return

    with requests.Session() as session:
        ask()
