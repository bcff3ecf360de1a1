"""Declared packages are resolved once, and taken by hash from then on: from an index that is a folder here."""

import base64
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.packages import fetch_wheels, pin_python
from claude_hitl_template.image.run import run


def wheel(index: Path, name: str, version: str, content: str = "", needs: str = "") -> Path:
    info = f"{name}-{version}.dist-info"
    required = f"Requires-Dist: {needs}\n" if needs else ""
    files = {
        f"{name}.py": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{path},sha256={base64.urlsafe_b64encode(sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}"
        for path, text in files.items()
    ]
    made = index / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": "\n".join([*rows, f"{info}/RECORD,,"])}.items():
            archive.writestr(path, text)
    return made


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    folder = tmp_path / "declared"
    folder.mkdir()
    return folder


def digest(file: Path) -> str:
    return f"--hash=sha256:{sha256(file.read_bytes()).hexdigest()}"


def test_each_package_is_written_with_version_and_hash_what_it_needs_too(index: Path, declared: Path):
    one, two = wheel(index, "hitlone", "1.0", needs="hitltwo"), wheel(index, "hitltwo", "2.0")
    assert pin_python(("hitlone",), {"ray": "2.60.0"}, declared) == ["hitlone==1.0", "hitltwo==2.0"]
    written = (declared / "requirements.txt").read_text().splitlines()
    assert written == [f"hitlone==1.0 {digest(one)}", f"hitltwo==2.0 {digest(two)}"]
    fetch_wheels(declared)
    assert (declared / "requirements.txt").read_text().splitlines() == written
    assert {path.name for path in (declared / "wheels").iterdir()} == {one.name, two.name}


def test_what_the_lock_has_is_not_among_them(index: Path, declared: Path):
    wheel(index, "hitlone", "1.0", needs="hitltwo")
    wheel(index, "hitltwo", "2.0")
    assert pin_python(("hitlone",), {"hitltwo": "2.0"}, declared) == ["hitlone==1.0"]
    assert "hitltwo" not in (declared / "requirements.txt").read_text()


def test_without_declared_packages_there_is_nothing_to_install(index: Path, declared: Path):
    assert pin_python((), {"ray": "2.60.0"}, declared) == []
    assert (declared / "requirements.txt").read_text() == ""


def test_a_package_that_was_exchanged_since_is_refused(index: Path, declared: Path, tmp_path: Path):
    """As the Dockerfile installs them, and as they are fetched for a build without an index."""
    wheel(index, "hitlone", "1.0")
    pin_python(("hitlone",), {}, declared)
    wheel(index, "hitlone", "1.0", content="evil = True")
    with pytest.raises(ConfigError, match=r"(?i)hashes"):
        fetch_wheels(declared)
    requirements = str(declared / "requirements.txt")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "-d",
        str(tmp_path / "d"),
    ]
    with pytest.raises(ConfigError, match=r"(?i)hashes"):
        run([*command, "-r", requirements], "-")


def test_the_dockerfile_installs_nothing_without_a_hash():
    text = (Path(__file__).parents[3] / "Dockerfile").read_text().replace("\\\n", " ")
    installs = [part for part in text.replace("&&", ";").split(";") if "pip install" in part]
    assert len(installs) == 2
    assert all("--require-hashes" in part and "--no-deps" in part for part in installs)
