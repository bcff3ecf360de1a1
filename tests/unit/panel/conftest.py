"""Imports Kodosumi once: it creates its folders in a temporary one, and its dependencies' warnings are ignored."""

import os
import tempfile
import warnings
from pathlib import Path

_FOLDER = Path(tempfile.mkdtemp(prefix="hitl-tests-kodosumi-"))
os.environ["PYTHON_DOTENV_DISABLED"] = "1"
os.environ["KODO_EXEC_DIR"] = str(_FOLDER / "execution")
os.environ["KODO_SPOOLER_LOG_FILE"] = str(_FOLDER / "spooler.log")
os.environ["KODO_YAML_BASE"] = str(_FOLDER / "config" / "config.yaml")
with warnings.catch_warnings(action="ignore"):
    import kodosumi.core  # noqa: F401
