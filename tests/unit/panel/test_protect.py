"""Requests of a role or of a foreign page to Kodosumi's real panel do what the role may do, and nothing else."""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import pytest

from claude_hitl_template.config.secret_files import PANEL_PROOF, panel_proof
from claude_hitl_template.panel.protect import ProtectedPanel
from tests.unit.panel.kodosumis import HOST, PASSWORD, URL, Answer, RealPanel, real_panel

# Kodosumi's guard of operators' routes leaves its connection to the garbage collector, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FOREIGN = {
    "another site": "https://evil.example",
    "no known origin": "null",
    "another port of this host": "http://panel.test:8080",
    "the host without its port": "http://panel.test",
    "a subdomain": "http://sub.panel.test:3370",
    "a name that begins like it": f"{URL}.evil.example",
    "a user before the host": "http://panel.test:3370@evil.example",
}


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealPanel]:
    with (
        catch_warnings(action="ignore"),
        pytest.MonkeyPatch.context() as patch,
        real_panel(tmp_path_factory.mktemp("panel"), patch) as one,
    ):
        yield one


@pytest.fixture(autouse=True)
def later(panel: RealPanel) -> None:
    """Moves the clock, so that attempts of other tests do not count."""
    panel.clock.now += 3600


def promoted(panel: RealPanel) -> tuple[str, str]:
    """Returns the request that makes `user` an operator."""
    return "PUT", f"/role/{panel.id_of('user')}"


# -- whose page sent it


@pytest.mark.parametrize("origin", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize(
    "content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded"]
)
def test_a_foreign_page_makes_nobody_an_operator(panel: RealPanel, origin: str, content_type: str) -> None:
    answer = panel.ask(
        *promoted(panel),
        {"operator": True},
        role="admin",
        headers={"Origin": origin},
        content_type=content_type,
    )
    assert answer.status == 403
    made = {"name": "mallory", "email": "m@example.com", "password": "p", "operator": True}
    answer = panel.ask(
        "POST", "/role", made, role="admin", headers={"Origin": origin}, content_type=content_type
    )
    assert answer.status == 403
    assert not panel.is_operator("user")
    assert panel.ask("GET", "/role/mallory", role="admin").status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/files/init"), ("DELETE", "/outputs"), ("DELETE", "/files/cancel/x"), ("POST", "/flow/register"),
        ("PUT", "/flow/register"), ("POST", "/-/127.0.0.1/8001/x"), ("POST", "/inputs/-/127.0.0.1/8001/x"),
        ("POST", "/lock/a/b"), ("POST", "/inputs/lock/a/b"), ("POST", "/admin/routes"), ("POST", "/login"),
        ("POST", "/api/login"), ("POST", "/logout"), ("PATCH", "/role"), ("POST", "//role"), ("POST", "/role/"),
    ],
)  # fmt: skip
def test_every_route_that_changes_something_wants_a_page_of_the_panel(
    panel: RealPanel, method: str, path: str
) -> None:
    foreign: dict[str, str | None] = {"Origin": "http://panel.test:8080"}
    assert panel.ask(method, path, {}, role="admin", headers=foreign).status == 403
    if "login" not in path:  # who logs in has no cookie yet
        assert panel.ask(method, path, {}, role="admin", headers={"Origin": None}).status == 403
    assert panel.ask(method, path, {}, headers={"Origin": None, "Sec-Fetch-Site": "same-site"}).status == 403


def test_a_program_shows_its_login_in_the_header(panel: RealPanel) -> None:
    header: dict[str, str | None] = {"Origin": None, "KODOSUMI_API_KEY": panel.logins["user"]}
    assert panel.ask("POST", "/files/init_batch", headers=header).status == 201
    foreign = header | {"Origin": "https://evil.example"}
    assert panel.ask("POST", "/files/init_batch", headers=foreign).status == 403
    empty: dict[str, str | None] = {"Origin": None, "KODOSUMI_API_KEY": ""}
    assert panel.ask("POST", "/files/init_batch", role="user", headers=empty).status == 403


def test_a_page_of_the_panel_itself_may(panel: RealPanel) -> None:
    assert panel.ask("POST", "/files/init_batch", role="user").status == 201
    without_origin: dict[str, str | None] = {"Origin": None, "Sec-Fetch-Site": "same-origin"}
    assert panel.ask("POST", "/files/init_batch", role="user", headers=without_origin).status == 201


def test_pages_elsewhere_lead_here_and_read_nothing(panel: RealPanel) -> None:
    def fetched(mode: str, dest: str, path: str = "/timeline/list") -> int:
        how: dict[str, str | None] = {
            "Origin": None, "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest,
        }  # fmt: skip
        return panel.ask("GET", path, role="user", headers=how).status

    assert fetched("navigate", "document") == 200
    for mode, dest in (
        ("no-cors", "script"),
        ("navigate", "iframe"),
        ("no-cors", "image"),
        ("cors", "empty"),
    ):
        assert fetched(mode, dest) == 403
    for path in ("/logout", "/admin/logout", f"/login?name=admin&password={PASSWORD}"):
        assert fetched("navigate", "document", path) == 403


@pytest.mark.parametrize("role", ["user", None])
def test_roles_are_changed_by_operators_only(panel: RealPanel, role: str | None) -> None:
    assert panel.ask(*promoted(panel), {"operator": True}, role=role).status == 401
    made = {"name": "eve", "email": "e@example.com", "password": "p", "operator": True}
    assert panel.ask("POST", "/role", made, role=role).status == 401
    assert panel.ask("DELETE", f"/role/{panel.id_of('other')}", role=role).status == 401
    assert panel.ask("GET", "/role", role=role).status == 401
    assert not panel.is_operator("user")
    assert panel.role("other")["active"]


@pytest.mark.parametrize(
    "host",
    [
        None,
        "evil.example",
        "evil.example:3370",
        "panel.test",
        "panel.test:8265",
        "127.0.0.1:3370",
        "",
        f"{HOST}.",
    ],
)
def test_a_name_that_is_not_the_panels_is_not_answered(panel: RealPanel, host: str | None) -> None:
    answer = panel.ask("GET", "/", headers={"Host": host, "Origin": host and f"http://{host}"})
    assert answer.status == 400


async def test_a_websocket_of_a_foreign_page_is_closed() -> None:
    reached: list[str] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        reached.append(scope["path"])

    async def may_act(_scope: Any) -> bool:
        return True

    async def opened(origin: str | None) -> list[str]:
        sent: list[str] = []

        async def send(message: Any) -> None:
            sent.append(message["type"])

        headers = [(b"host", HOST.encode()), (b"cookie", b"kodosumi_jwt=x")]
        headers += [(b"origin", origin.encode())] if origin else []
        scope = {"type": "websocket", "path": "/x", "headers": headers, "query_string": b"", "scheme": "ws"}
        await protected(scope, None, send)  # type: ignore[arg-type]
        return sent

    protected = ProtectedPanel(app, hosts=[HOST], secret="s", may_act=may_act)
    for origin in (*FOREIGN.values(), None):
        assert await opened(origin) == ["websocket.close"]
    assert not reached
    assert await opened(URL) == []
    assert reached == ["/x"]


# -- what it brings


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/plain;application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        None,
    ],
)
def test_json_is_called_json(panel: RealPanel, content_type: str | None) -> None:
    for method, path in (promoted(panel), ("POST", "/role"), ("POST", "/files/init"), ("DELETE", "/outputs")):
        answer = panel.ask(method, path, {"operator": True}, role="admin", content_type=content_type)
        assert answer.status == 400
        assert answer.body == b"Content-Type: send application/json"
    assert not panel.is_operator("user")


def test_a_body_of_no_told_length_is_a_body(panel: RealPanel) -> None:
    chunked: dict[str, str | None] = {
        "Transfer-Encoding": "chunked",
        "Content-Length": None,
        "Content-Type": "text/plain",
    }
    body = b'11\r\n{"operator":true}\r\n0\r\n\r\n'
    assert panel.ask(*promoted(panel), body, role="admin", headers=chunked).status == 400
    assert not panel.is_operator("user")


def test_forms_are_taken_where_the_panel_has_them(panel: RealPanel) -> None:
    form = f"name=admin&password={PASSWORD}&redirect=/admin".encode()
    answer = panel.ask("POST", "/login", form, content_type="application/x-www-form-urlencoded")
    assert (answer.status, answer.headers["location"]) == (302, "/admin")
    assert (
        panel.ask("POST", "/api/login", form, content_type="application/x-www-form-urlencoded").status == 400
    )


@pytest.mark.parametrize("path", ["/deploy", "/deploy/", "/deploy/x", "/serve", "//serve", "/%73erve"])
def test_nothing_is_deployed_from_the_panel_and_rays_dashboard_is_not_asked(
    panel: RealPanel, path: str
) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = panel.ask(method, path, role="admin")
        assert answer.status == 404
        assert b"./hitl deploy" in answer.body


# -- where it leads

ENCODINGS = (
    "..",
    "%2e%2e",
    "%2E.",
    "%252e%252e",
    "%25252e%25252e",
    "..%2f..",
    "..%5c",
    "%2e%2e%5c..",
    "..%00",
)


def outside(panel: RealPanel, *, in_flow: Path) -> tuple[Path, str]:
    """A secret file outside of all roles' folders, and the relative path to it from a flow's files."""
    secret = panel.folder / "admin.key"
    secret.write_text("a secret of the service")
    up = len(in_flow.relative_to(panel.folder).parts)
    return secret, "/".join([".."] * up) + "/admin.key"


@pytest.mark.parametrize("role", ["user", "admin"])
@pytest.mark.parametrize("dots", ENCODINGS)
def test_no_encoding_of_a_path_leads_out_of_a_flows_folder(panel: RealPanel, role: str, dots: str) -> None:
    flow, folder = panel.flow_of(role)
    secret, way = outside(panel, in_flow=folder)
    for path in (f"/files/{flow}/out/{way}", f"/files/{flow}/in/x/{way}", f"/files/{way}"):
        for method in ("GET", "DELETE"):
            answer = panel.ask(method, path.replace("..", dots), role=role)
            assert 400 <= answer.status < 500
            assert b"a secret" not in answer.body
    assert secret.exists()
    for path in (
        "/outputs/status/..",
        "/outputs/raw/..",
        "/api/dashboard/execution/../files",
        "/static/../app.py",
    ):
        assert panel.ask("GET", path.replace("..", dots), role=role).status == 400


@pytest.mark.parametrize("role", ["user", "admin"])
def test_no_absolute_path_and_no_link_leads_out_either(panel: RealPanel, role: str) -> None:
    flow, folder = panel.flow_of(role)
    secret, _ = outside(panel, in_flow=folder)
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to(panel.folder)
    for way in (
        f"/{secret}",
        f"%2f{secret}",
        f"%252f{str(secret)[1:]}",
        "link",
        "up/admin.key",
        f"up/./{secret.name}",
    ):
        for method in ("GET", "DELETE"):
            answer = panel.ask(method, f"/files/{flow}/out/{way}", role=role)
            assert 400 <= answer.status < 500
            assert b"a secret" not in answer.body
    assert secret.exists()


def uploaded(panel: RealPanel, role: str, content: bytes = b"from a browser") -> str:
    """Returns the id of an upload whose only chunk has arrived."""
    made = panel.ask("POST", "/files/init", {"filename": "x", "total_chunks": 1}, role=role)
    upload = made.json()["upload_id"]
    assert chunk(panel, role, upload, content).json()["status"] == "chunk received"
    return upload


def chunk(panel: RealPanel, role: str, upload: str, content: bytes = b"x", number: str = "0") -> Answer:
    fields = {"upload_id": upload, "chunk_number": number}
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode()
        for n, v in fields.items()
    ]
    file = (
        b'--b\r\nContent-Disposition: form-data; name="chunk"; filename="blob"\r\n\r\n'
        + content
        + b"\r\n--b--\r\n"
    )
    body = b"".join([*parts, file])
    return panel.ask("POST", "/files/chunk", body, role=role, content_type="multipart/form-data; boundary=b")


def test_files_are_uploaded_listed_read_and_removed_by_their_role_and_no_other(panel: RealPanel) -> None:
    upload, flow = uploaded(panel, "user"), uuid.uuid4().hex
    batch = panel.ask("POST", "/files/init_batch", role="user").json()["batch_id"]
    items = {upload: {"filename": "sub/a 100%.txt", "totalChunks": 1}}
    (done,) = panel.ask("POST", f"/files/complete/{flow}/{batch}/in", items, role="user").json()
    assert done["status"] == "upload complete"
    where = f"/files/{flow}/in/sub/a%20100%25.txt"
    assert panel.ask("GET", where, role="user").body == b"from a browser"
    assert [f["path"] for f in panel.ask("GET", f"/files/{flow}/in", role="user").json()] == [
        "in/sub/a 100%.txt"
    ]
    for stranger in ("other", "admin"):
        assert panel.ask("GET", where, role=stranger).status == 404
        assert panel.ask("DELETE", where, role=stranger).status == 404
    assert panel.ask("GET", where).status == 401
    assert panel.ask("DELETE", f"/files/{flow}/in/", role="user").status == 204
    assert panel.ask("GET", where, role="user").status == 404


NAMES_OUT = (
    "../../../x",
    "/tmp/hitl-x",
    "a/../../../../x",
    "..",
    "a\\..\\x",
    "a\0",
    "",
    "a//tmp/x",
    "./x",
    "a/.",
)


@pytest.mark.parametrize("role", ["user", "admin"])
@pytest.mark.parametrize("name", NAMES_OUT)
def test_an_upload_is_completed_in_its_own_folder_only(panel: RealPanel, role: str, name: str) -> None:
    upload, flow = uploaded(panel, role), uuid.uuid4().hex
    before = everything(panel)
    whole = {"upload_id": upload, "filename": name, "total_chunks": 1}
    assert (
        panel.ask(
            "POST", f"/files/complete/{flow}/b/in", {upload: {"filename": name, "totalChunks": 1}}, role=role
        ).status
        == 400
    )
    for more in ({}, {"batch_id": str(uuid.uuid4())}, {"fid": flow}):
        assert panel.ask("POST", "/files/complete/in", whole | more, role=role).status == 400
    assert everything(panel) == before


@pytest.mark.parametrize("given", ["..", "../x", "/tmp", "a/b", ".", "a\0", 7, ["x"], {"a": 1}])
def test_flows_batches_and_uploads_are_named_by_ids(panel: RealPanel, given: object) -> None:
    upload = uploaded(panel, "user")
    before = everything(panel)
    for name in ("fid", "batch_id", "upload_id"):
        whole = {"upload_id": upload, "filename": "x", "total_chunks": 1, name: given}
        assert panel.ask("POST", "/files/complete/in", whole, role="user").status == 400
    assert (
        panel.ask(
            "POST", "/files/init", {"filename": "x", "total_chunks": 1, "batch_id": given}, role="user"
        ).status
        == 400
    )
    items = {str(given): {"filename": "x", "totalChunks": 1}}
    if not re.fullmatch("[0-9]", str(given)):
        assert panel.ask("POST", "/files/complete/f/b/in", items, role="user").status == 400
        assert chunk(panel, "user", str(given).replace("\0", "%00")).status == 400
    assert panel.ask("DELETE", "/outputs", {"fid": [given]}, role="user").status == 400
    assert everything(panel) == before


@pytest.mark.parametrize("number", ["../../x", "/tmp/x", "0/..", "a"])
def test_a_chunk_has_a_number(panel: RealPanel, number: str) -> None:
    upload = uploaded(panel, "user")
    assert chunk(panel, "user", upload, number=number).status == 400


@pytest.mark.parametrize(
    "body", [[], "x", 1, None, {"x": 1}, {"x": {"filename": 1}}, {"x": {"filename": None}}]
)
def test_what_is_no_list_of_uploads_is_refused(panel: RealPanel, body: object) -> None:
    answer = panel.ask("POST", "/files/complete/f/b/in", b"null" if body is None else body, role="user")
    assert answer.status == 400


def test_nobody_ends_or_deletes_the_flow_of_another(panel: RealPanel) -> None:
    flow, folder = panel.flow_of("other")
    database = folder.parent / "sqlite3.db"
    database.write_bytes(b"")
    foreign = f"../{panel.id_of('other')}/{flow}"
    for role in ("user", "admin"):
        assert panel.ask("DELETE", "/outputs", {"fid": [foreign]}, role=role).status == 400
        assert panel.ask("DELETE", "/outputs", {"fid": [str(folder.parent)]}, role=role).status == 400
        assert panel.ask("DELETE", f"/outputs/{foreign}".replace("/", "%2f", 1), role=role).status in (
            400,
            404,
        )
    assert database.exists()


def everything(panel: RealPanel) -> set[Path]:
    return {path for path in panel.folder.rglob("*") if path.parent.name != "config"}


# -- what it answers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/static/kodosumi.css"),
        ("GET", "/nothing"),
        ("GET", "/a/../b"),
        ("POST", "/role"),
        ("GET", "/admin/dashboard"),
    ],
)
def test_every_answer_tells_browsers_to_be_careful(panel: RealPanel, method: str, path: str) -> None:
    headers = panel.ask(method, path, role="user", headers={"Accept": "text/html"}).headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["x-frame-options"] == "DENY"


def test_no_script_reads_the_login_and_no_other_site_sends_it(panel: RealPanel) -> None:
    cookie = panel.log_in("admin", PASSWORD).headers["set-cookie"].lower()
    assert cookie.startswith("kodosumi_jwt=")
    assert "; httponly" in cookie
    assert "; samesite=lax" in cookie


@pytest.mark.parametrize(
    "where",
    ["https://evil.example/", "//evil.example", f"{URL}.evil.example/", "javascript:x"],
)
def test_a_login_leads_to_the_panel(panel: RealPanel, where: str) -> None:
    form = f"name=admin&password={PASSWORD}&redirect={where}".encode()
    answer = panel.ask("POST", "/login", form, content_type="application/x-www-form-urlencoded")
    assert (answer.status, answer.headers["location"]) == (302, "/")
    assert panel.ask("GET", f"/logout?redirect={where}", role="user").headers["location"] == "/"


def test_errors_have_no_traceback(panel: RealPanel) -> None:
    answer = panel.ask("GET", "/flow", role="user")  # asks an actor of Ray, which is not there
    assert answer.status == 500
    assert answer.json()["error"] == "AttributeError"
    assert b"stacktrace" not in answer.body
    assert b"site-packages" not in answer.body


# -- who logs in


def wrong(panel: RealPanel, name: str, *, source: str = "127.0.0.1", way: str = "/api/login") -> Answer:
    if way.startswith("GET "):
        return panel.ask("GET", f"{way[4:]}?name={name}&password=wrong", source=source)
    if way.strip("/") in ("login", "%6cogin"):
        form = f"name={name}&password=wrong".encode()
        return panel.ask("POST", way, form, content_type="application/x-www-form-urlencoded", source=source)
    return panel.ask("POST", way, {"name": name, "password": "wrong"}, source=source)


WAYS = (
    "/api/login",
    "/api/login/",
    "//api//login",
    "/login",
    "/login/",
    "/%6cogin",
    "GET /login",
    "GET //login/",
)


def test_ten_logins_may_fail_in_five_minutes_from_an_address_whatever_they_name(panel: RealPanel) -> None:
    for number in range(10):
        assert wrong(panel, f"unknown-{number}", way=WAYS[number % len(WAYS)]).status == 401
    for way in WAYS:
        refused = wrong(panel, "another", way=way)
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) == 30
    assert panel.log_in("admin", PASSWORD).status == 429
    assert panel.log_in("admin", PASSWORD, source="127.0.0.9").status == 200
    panel.clock.now += 30
    assert wrong(panel, "unknown").status == 401
    assert wrong(panel, "unknown").status == 429


def test_ten_may_fail_for_a_name_from_wherever_they_come(panel: RealPanel) -> None:
    for number in range(10):
        assert (
            wrong(panel, "admin", source=f"127.0.1.{number + 1}", way=WAYS[number % len(WAYS)]).status == 401
        )
    assert panel.log_in("admin", PASSWORD, source="127.0.2.1").status == 429
    assert panel.log_in("user", "password-of-user", source="127.0.2.1").status == 200
    panel.clock.now += 300
    assert panel.log_in("admin", PASSWORD, source="127.0.2.1").status == 200


def test_logins_that_succeed_are_not_counted(panel: RealPanel) -> None:
    for _ in range(12):
        assert panel.ask("GET", "/login?name=unknown&name=unknown&password=x", source="127.0.3.1").status in (
            400,
            401,
            429,
        )
    for _ in range(12):
        assert panel.log_in("user", "password-of-user", source="127.0.3.2").status == 200


def test_the_services_own_login_is_not_held_up_by_what_others_try(panel: RealPanel) -> None:
    for number in range(10):
        wrong(panel, "admin", source=f"127.0.4.{number + 1}")
    own: dict[str, str | None] = {PANEL_PROOF: panel_proof(panel.settings.SECRET_KEY)}
    assert panel.log_in("admin", PASSWORD, headers=own).status == 200
    assert panel.log_in("admin", PASSWORD, headers={PANEL_PROOF: panel_proof("another secret")}).status == 429
    login: dict[str, str | None] = {"KODOSUMI_API_KEY": panel.logins["user"]}
    assert panel.log_in("admin", PASSWORD, headers=login).status == 429


def test_a_login_is_short(panel: RealPanel) -> None:
    assert panel.log_in("x" * 100_000, "x").status == 413


def test_a_role_that_was_switched_off_or_deleted_may_nothing_though_its_login_is_good(
    panel: RealPanel,
) -> None:
    made = {"name": "leaver", "email": "l@example.com", "password": "p", "operator": True}
    role = panel.ask("POST", "/role", made, role="admin").json()
    panel.logins["leaver"] = panel.log_in("leaver", "p").json()["KODOSUMI_API_KEY"]
    assert panel.is_operator("leaver")
    assert panel.ask("PUT", f"/role/{role['id']}", {"active": False}, role="admin").status == 200
    refused = panel.ask("GET", "/", role="leaver", headers={"Accept": "text/html"})
    assert refused.status == 401
    assert 'kodosumi_jwt=""' in refused.headers["set-cookie"]
    assert not panel.is_operator("leaver")
    assert panel.ask("GET", "/static/kodosumi.css", role="leaver").status == 200
    assert panel.ask("DELETE", f"/role/{role['id']}", role="admin").status == 204
    assert not panel.is_operator("leaver")
