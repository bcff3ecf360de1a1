"""Confines the paths in requests to Kodosumi's panel to the folders of the role's own flows and uploads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kodosumi.service.dashboard import DashboardAPI
from kodosumi.service.files import FileControl
from kodosumi.service.inputs.inputs import InputsController
from kodosumi.service.inputs.outputs import OutputsController
from kodosumi.service.proxy import LockController
from litestar import Request
from litestar.exceptions import HTTPException

FOLDERS = ("in", "out")
IDS = ("fid", "batch_id", "upload_id", "lid")
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_UNSAFE_CHARS = re.compile(r"[\x00-\x1f\x7f\\]")

type PanelRequest = Request[Any, Any, Any]


def install() -> None:
    """Adds checks to Kodosumi's controllers. Call it before its application is created.

    Kodosumi joins paths from requests to a folder without checking them. The checks use the values that Kodosumi itself
    parsed, so both always see the same path.
    """
    FileControl.before_request = _check_files
    OutputsController.before_request = _check_outputs
    for controller in (DashboardAPI, LockController, InputsController):
        controller.before_request = _check_ids


async def _check_ids(request: PanelRequest) -> None:
    for name in IDS:
        if name in request.path_params:
            _check_id(request.path_params[name], name)


async def _check_outputs(request: PanelRequest) -> None:
    await _check_ids(request)
    if request.method == "DELETE" and "fid" not in request.path_params:
        flows = _object(await request.json()).get("fid", [])
        for flow in flows if isinstance(flows, list) else [flows]:
            _check_id(flow, "fid")


async def _check_files(request: PanelRequest) -> None:
    await _check_ids(request)
    settings = request.app.state["settings"]
    own, uploads = Path(settings.EXEC_DIR) / str(request.user), Path(settings.UPLOAD_DIR)
    given = request.path_params
    if "path" in given:
        _check_inside(own, given["fid"], given["path"].lstrip("/"))
        return
    if "upload_id" in given:
        _check_inside(uploads, given["upload_id"])
    folder = given.get("dir_type", FOLDERS[0])
    for flow, upload, name in await _uploaded(request):
        _check_inside(uploads, upload)
        if name is not None:
            _check_inside(own if flow else uploads, flow or upload, f"{folder}/{name}")


async def _uploaded(request: PanelRequest) -> list[tuple[str, str, str | None]]:
    """The flow or batch, the upload, and the name for its file, as named in the body."""
    if request.method != "POST" or request.url.path.rstrip("/").endswith("/init_batch"):
        return []
    if request.content_type[0] == "multipart/form-data":
        form = await request.form()
        return [("", str(_check_id(upload, "upload_id")), None) for upload in form.getall("upload_id", [])]
    body = _object(await request.json())
    if "fid" in request.path_params:  # by upload
        flow = str(request.path_params["fid"])
        return [
            (flow, _check_id(upload, "upload_id"), _name(_object(said).get("filename")))
            for upload, said in body.items()
        ]
    for name in IDS:
        if body.get(name):
            _check_id(body[name], name)
    name = _name(body.get("filename"))
    return [(str(body.get("fid") or ""), str(body["upload_id"]), name)] if "upload_id" in body else []


def _check_inside(base: Path, first: str, below: str = "") -> None:
    """Raises HTTPException unless `below`, with all links resolved, is inside the folder `first` of `base`."""
    below = below.rstrip("/")
    if _UNSAFE_CHARS.search(below) or (below and not {"", ".", ".."}.isdisjoint(below.split("/"))):
        raise _refused("path")
    try:
        inside = (base / first / below).resolve().is_relative_to(base.resolve() / first)
    except (OSError, RuntimeError, ValueError) as error:
        raise _refused("path") from error
    if not inside:
        raise _refused("path")


def _check_id(given: object, name: str) -> str:
    if not isinstance(given, str) or not _ID.fullmatch(given):
        raise _refused(name)
    return given


def _name(given: object) -> str:
    if not isinstance(given, str) or not given:
        raise _refused("filename")
    return given


def _object(given: object) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise HTTPException("the body must be a JSON object", status_code=400)
    return given


def _refused(name: str) -> HTTPException:
    return HTTPException(f"{name}: it leads out of its folder, or is none", status_code=400)
