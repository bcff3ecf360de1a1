"""`hitl audit` verifies exports and receipts without a service, its data or its settings."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from claude_hitl_template.cli.app import app
from claude_hitl_template.domain.audit.receipts import receipt
from claude_hitl_template.errors import HitlError
from tests.unit.domain.test_audit import NOON, OTHER, SIGNER, at, chained, draft, exported


def run(*arguments: str | Path, status: int = 0) -> str:
    """Runs a command and returns its output. Raises the command's errors."""
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    if isinstance(result.exception, HitlError):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path, exported(chained([draft(number) for number in range(1, 11)])))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [SIGNER.jwk]}))
    return path


def written(folder: Path, documents: list[dict[str, Any]]) -> Path:
    path = folder / "audit.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents))
    return path


def documents_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_whole_export_is_verified_with_the_published_key(file: Path, key: Path):
    said = run("verify", file, "--key", key)
    assert "whole: entries 1 to 10 of workspace wrkspc_1, 3 signatures" in said
    assert "compare this key" not in said


def test_without_a_key_the_key_is_named_for_comparison(file: Path):
    said = run("verify", file)
    assert f"by key {SIGNER.jwk['kid']}" in said
    assert "compare this key" in said


def test_what_is_wrong_is_named(file: Path, key: Path, tmp_path: Path):
    documents = documents_of(file)
    documents[at(documents, 5)]["actor"]["name"] = "\x1b[2Jmallory"
    del documents[at(documents, 8)]
    said = run("verify", written(tmp_path, documents), "--key", key, status=1)
    assert said.splitlines() == [
        "entry 5 was changed: its content does not have its hash",
        "entry 8 is missing",
    ]


def test_another_key_is_refused(file: Path, key: Path):
    key.write_text(json.dumps(OTHER.jwk))
    assert "signed by another key" in run("verify", file, "--key", key, status=1)


def test_many_problems_are_counted(file: Path, key: Path, tmp_path: Path):
    documents = [*documents_of(file), *documents_of(file), *documents_of(file)]
    assert "... and " in run("verify", written(tmp_path, documents), "--key", key, status=1)


def test_an_earlier_export_shows_a_log_that_was_made_again(file: Path, key: Path, tmp_path: Path):
    earlier = tmp_path / "earlier.jsonl"
    file.rename(earlier)
    again = written(tmp_path, exported(chained([draft(number, note="x") for number in range(1, 12)])))
    assert run("verify", earlier, "--key", key, "--earlier", earlier)
    said = run("verify", again, "--key", key, "--earlier", earlier, status=1)
    assert "entry 4 has another hash than the service signed at" in said


def test_a_receipt_is_verified(tmp_path: Path, key: Path):
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(receipt(SIGNER, chained([draft(1, digest="abc")]), NOON)))
    assert "appr_1, approval.decided: allow by Zoë (prin_1)" in run("verify-receipt", path, "--key", key)
    path.write_text(path.read_text().replace("allow", "deny"))
    assert "forged or was changed" in run("verify-receipt", path, "--key", key, status=1)
    path.write_text("no JSON")
    assert "not a receipt" in run("verify-receipt", path, status=1)


def test_a_file_that_is_missing_or_is_not_a_key_is_an_error_that_names_the_fix(file: Path, tmp_path: Path):
    with pytest.raises(HitlError, match="name a file that exists"):
        run("verify", tmp_path / "missing")
    with pytest.raises(HitlError, match="GET /v1/audit/keys"):
        run("verify", file, "--key", file)


def test_verification_needs_no_service_and_reads_standard_input(file: Path, key: Path, tmp_path: Path):
    """In an empty folder, with an environment that no settings could be loaded from."""
    command = [sys.executable, "-m", "claude_hitl_template.cli", "audit", "verify", "-", "--key", str(key)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"HITL_SERVE_PORT": "not a port", "PYTHONPATH": str(Path(__file__).parents[3])},
        input=file.read_text(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("whole: entries 1 to 10")
