"""Labels of an image and the paths inside it. The code that starts sessions in images reads both."""

IMAGE_NAME = "claude-hitl-worker"

# Labels of the image; strings all of them.
VERSION = "org.claude-hitl.version"  # of the package
COMMIT = "org.claude-hitl.commit"  # full hash, with "-dirty" when the checkout had changes; "unknown" outside of git
CODE = "org.claude-hitl.code"  # code_version() of the package in it
RAY = "org.claude-hitl.ray"  # "2.60.0"
PYTHON = "org.claude-hitl.python"  # minor version, "3.12"
LOCK = "org.claude-hitl.lock"  # SHA-256 (hex) of requirements.lock
# As the OCI names them. The image's own base may have said them of its base, so that they are always set; empty: not known.
BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"  # "sha256:..."
MANIFEST = "org.claude-hitl.manifest"  # the file at MANIFEST_PATH, as compact JSON

# Places in the image.
ROOT = "/app"
HOME = "/app/template_user"  # with the user level in .claude
WORKSPACE = "/app/workspace"  # a session's folder, with the project level in it
PLUGINS = "/app/plugins"  # <marketplace>/plugins/<plugin>
MANIFEST_PATH = "/app/.dependency-manifest.json"
MANAGED_SETTINGS = "/etc/claude-code/managed-settings.json"
# Names at the top of the workspace that belong to the image, as far as it has them.
PROJECT_LAYER = (".claude", "CLAUDE.md")
