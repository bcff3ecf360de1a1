"""A base image made from this machine, for use without a registry: Debian, this Python and the locked packages.

It replaces the RAY_BASE of the Dockerfile. Nothing that pip installs comes from the network: the packages of the
running .venv are copied, those that requirements.lock names and no others.
"""

import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.context import Checkout
from claude_hitl_template.image.run import show
from claude_hitl_template.image.tools import Tool
from claude_hitl_template.image.trees import copy_file

BASE_NAME = "localhost/claude-hitl-base"
# What the Claude Code CLI's tools and those who look into a container use.
_PACKAGES = ("ca-certificates", "git", "procps")
_PYTHON = Path("opt/python")
_NOT_COPIED = re.compile(
    r"(test|idlelib|tkinter|turtledemo|lib2to3|config-.*|site-packages|__pycache__|.*\.a|_tkinter\..*|nis\..*"
    r"|_test.*|_ctypes_test.*|xx.*\.so)"
)
_DOCKERFILE = """\
FROM scratch
ADD debian.tar /
COPY opt /opt
RUN echo /opt/python/lib >/etc/ld.so.conf.d/python.conf && ldconfig
ENV PATH=/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
"""
_EXCLUDED_FROM_DEBIAN = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")
# They say where this machine gets its packages from, perhaps with a password, and what it is called.
_FORGET = 'cd "$1/etc" && rm -rf apt/sources.list apt/sources.list.d apt/auth.conf.d hostname resolv.conf'
FIX_VENV = "delete .venv and run ./hitl again, which installs requirements.lock"


def build_base(checkout: Checkout, tool: Tool) -> str:
    """Builds the base image unless it exists; returns its name. Raises ConfigError if a tool is missing here."""
    suite, mmdebstrap = _suite(), _mmdebstrap()
    prefix = _python_prefix()
    packages = sorted({*_PACKAGES, *_library_packages(prefix), *checkout.dependencies.system})
    name = f"{BASE_NAME}:{_recipe(checkout, suite, packages)}"
    if tool.has(name):
        return name
    with tempfile.TemporaryDirectory(prefix="hitl-base-") as made:
        folder = Path(made)
        debian = folder / "debian.tar"
        excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED_FROM_DEBIAN]
        options = [
            "--variant=minbase",
            "--quiet",
            "--skip=output/dev",
            f"--customize-hook={_FORGET}",
            *excluded,
        ]
        fix = "read what it said above; apt update tells whether the packages can be had"
        sources = folder / "sources"
        sources.mkdir()
        mirrors = [str(path) for path in _write_sources(suite, sources)]
        show([mmdebstrap, *options, f"--include={','.join(packages)}", suite, debian, *mirrors], fix)
        shutil.rmtree(sources)
        _copy_python(prefix, folder / _PYTHON)
        _copy_packages(checkout, folder / _PYTHON)
        _compile(folder)
        (folder / "Dockerfile").write_text(_DOCKERFILE)
        tool.build(folder, tags=[name], build_args={}, image_labels={})
    return name


def _suite() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    is_debian = "debian" in (release.get("ID", ""), *release.get("ID_LIKE", "").split())
    if not is_debian or not release.get("VERSION_CODENAME"):
        raise ConfigError(
            "--from-host makes the image from Debian packages, and this machine is not Debian or Ubuntu",
            "build without --from-host where the base image can be pulled, or name one with --base",
        )
    return release["VERSION_CODENAME"]


def _mmdebstrap() -> str:
    found = shutil.which("mmdebstrap")
    if found is None:
        raise ConfigError("--from-host needs mmdebstrap", "apt install mmdebstrap")
    return found


def _python_prefix() -> Path:
    prefix = Path(sys.base_prefix).resolve()
    if prefix in (Path("/usr"), Path("/usr/local"), Path("/")):
        raise ConfigError(
            f"--from-host copies the folder of the running Python, and that is {prefix} with the rest of the system",
            f"install a Python of its own (uv python install {python_minor()}), delete .venv, run ./hitl with it",
        )
    return prefix


def _recipe(checkout: Checkout, suite: str, packages: list[str]) -> str:
    """A hash of everything that a base image depends on, as 12 hexadecimal characters."""
    lock = (checkout.root / "requirements.lock").read_bytes()
    inputs = "\n".join([suite, *packages, sys.version, platform.machine()]).encode()
    return sha256(Path(__file__).read_bytes() + lock + inputs).hexdigest()[:12]


# -- Debian


def _library_packages(prefix: Path) -> set[str]:
    """The Debian packages that hold the libraries which this Python is linked to."""
    version = f"python{python_minor()}"
    binaries = [Path(sys.executable).resolve(), *(prefix / "lib").glob("lib*.so*")]
    dynload = (prefix / "lib" / version / "lib-dynload").glob("*.so")
    binaries += [path for path in dynload if not _NOT_COPIED.fullmatch(path.name)]
    listed = subprocess.run(  # noqa: S603 - a binary without libraries makes its status 1
        ["ldd", "--", *binaries],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    libraries = {Path(found) for found in re.findall(r"=> (/\S+)", listed)}
    system = sorted(path for path in libraries if not path.resolve().is_relative_to(prefix))
    return {_package_of(path) for path in system}


def _package_of(library: Path) -> str:
    for path in (library, library.resolve(), Path("/usr") / library.relative_to("/")):
        result = subprocess.run(  # noqa: S603
            ["dpkg-query", "--search", path],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode == 0:
            return result.stdout.partition(":")[0]
    raise ConfigError(
        f"the running Python needs {library}, which belongs to no Debian package",
        f"use a Python that is built from Debian's libraries or none (uv python install {python_minor()}), delete .venv",
    )


def _write_sources(suite: str, folder: Path) -> Iterator[Path]:
    """This machine's own apt sources of the suite, as files; none where it has none, and mmdebstrap knows its own."""
    wanted = re.compile(rf"\b(?<![\w-]){re.escape(suite)}(-\w+)?(?![\w-])")
    etc = Path("/etc/apt")
    lists = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]
    lines = [
        line
        for path in lists
        if path.exists()
        for line in path.read_text(errors="replace").splitlines()
        if line.startswith("deb ") and any(wanted.fullmatch(word) for word in line.split())
    ]
    stanzas = [
        stanza
        for path in sorted((etc / "sources.list.d").glob("*.sources"))
        for stanza in path.read_text(errors="replace").split("\n\n")
        if (suites := re.search(r"^Suites:(.*)$", stanza, re.MULTILINE))
        and any(wanted.fullmatch(word) for word in suites[1].split())
    ]
    for name, parts, between in (("host.list", lines, "\n"), ("host.sources", stanzas, "\n\n")):
        if parts:
            path = folder / name
            path.write_text(between.join(part.strip("\n") for part in parts) + "\n")
            yield path


# -- Python


def _copy_python(prefix: Path, target: Path) -> None:
    """The interpreter and its library, without tests, Tk, static libraries and other people's packages."""
    version = f"python{python_minor()}"

    def left_out(_folder: str, names: list[str]) -> list[str]:
        return [name for name in names if _NOT_COPIED.fullmatch(name)]

    copy_file(Path(sys.executable).resolve(), target / "bin" / version)
    for alias in ("python3", "python"):
        (target / "bin" / alias).symlink_to(version)
    library = target / "lib" / version
    shutil.copytree(prefix / "lib" / version, library, symlinks=True, ignore=left_out)
    (library / "site-packages").mkdir()
    for path in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy2(path, target / "lib" / path.name, follow_symlinks=False)


def _copy_packages(checkout: Checkout, target: Path) -> None:
    """The locked distributions of the running .venv, file by file as their records have it."""
    site = target / "lib" / f"python{python_minor()}" / "site-packages"
    for name, version in checkout.lock.items():
        for source, relative in _files(_installed(name, version)):
            if relative.parts[0] == "..":
                if source.parent.name == "bin":
                    _copy_script(source, target / "bin" / source.name)
            else:
                copy_file(source, site / relative)


def _installed(name: str, version: str) -> Distribution:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise ConfigError(f"{name} is not installed here", FIX_VENV) from None
    if found.version != version:
        raise ConfigError(f"{name} is {found.version} here, and requirements.lock has {version}", FIX_VENV)
    return found


def _files(found: Distribution) -> Iterator[tuple[Path, Path]]:
    """Each file of a distribution: where it is, and its path from site-packages."""
    purelib = Path(sysconfig.get_path("purelib"))
    for file in found.files or ():
        source = Path(str(file.locate()))
        if source.suffix != ".pyc" and source.is_file():
            yield source, Path(os.path.relpath(source, purelib))


def _copy_script(source: Path, target: Path) -> None:
    """A command of a distribution, run by the image's Python instead of this one."""
    content = source.read_bytes()
    first, newline, rest = content.partition(b"\n")
    copy_file(source, target)
    if first.startswith(b"#!") and b"python" in first:
        target.write_bytes(b"#!/opt/python/bin/python3" + newline + rest)


def _compile(folder: Path) -> None:
    """Compiles all modules: the image's user cannot write `__pycache__`, so each start would compile them again."""
    command = [
        sys.executable,
        "-m",
        "compileall",
        "-q",
        "-q",
        "-j",
        "0",
        "--invalidation-mode",
        "unchecked-hash",
    ]
    where = ["-s", str(folder), "-p", "/", str(folder / _PYTHON / "lib")]
    # Some packages carry files of another Python version, which do not compile and are never imported.
    subprocess.call([*command, *where], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603


def account_of(user: str) -> pwd.struct_passwd:
    """The account whose storage is to be filled. Raises ConfigError where there is none, or this is not root."""
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(f"there is no user {user}", f"useradd --create-home {user}") from None
    if os.getuid() != 0:
        raise ConfigError("only root can fill another user's storage", f"run ./hitl image build as {user}")
    return account


def load_for(tool: Tool, tags: list[str], account: pwd.struct_passwd) -> None:
    """Copies an image, with its tags, into the storage of another user, who runs containers without root."""
    user = account.pw_name
    podman = shutil.which("podman")
    if podman is None:
        raise ConfigError("there is no podman here", "apt install podman")
    environment = {"HOME": account.pw_dir, "USER": user, "PATH": os.environ["PATH"]}
    save = [podman if tool.name == "buildah" else tool.program, "save", *tags]
    with subprocess.Popen(save, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as saving:  # noqa: S603
        loaded = subprocess.run(  # noqa: S603
            [podman, "load", "--quiet"],
            stdin=saving.stdout,
            capture_output=True,
            text=True,
            cwd="/",
            env=environment,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            check=False,
        )
        save_errors = saving.communicate()[1].decode(errors="replace")
    if loaded.returncode != 0 or saving.returncode != 0:
        fix = f"`runuser -u {user} -- podman info` must work, with room for the image in {account.pw_dir}"
        raise ConfigError(
            f"{user} could not load {tags[0]}: {loaded.stderr.strip()} {save_errors.strip()}", fix
        )
