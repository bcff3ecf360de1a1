#!/bin/sh
# Starts the Claude Code CLI ($HITL_CLI) for one session, given to the SDK as its cli_path.
#
# - Only the variables below reach the agent: whatever the service's own process holds (keys, tokens) does not.
# - The CLI dies with the process that started it, so that no agent goes on unattended (Linux only: setpriv).
# - SHLVL is there: without it bash takes the CLI's sockets for a remote shell's and reads ~/.bashrc before each command,
#   which took 300 ms where pyenv is set up.
# - In an image, the user layer ($HITL_USER_LAYER) is put into the CLI's config folder: the SDK makes an empty one whenever
#   it resumes. As links: the agent can write in its config folder, and not in the layer.
for name in $(env | sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p'); do
  case $name in
    PATH | HOME | PWD | USER | LOGNAME | SHELL | LANG | LC_* | TZ | TERM | TMPDIR | SHLVL | HITL_CLI | HITL_USER_LAYER) ;;
    CLAUDE_* | ANTHROPIC_BASE_URL | ANTHROPIC_API_KEY | IS_SANDBOX | DISABLE_*) ;;
    *) unset "$name" ;;
  esac
done
export SHLVL="${SHLVL:-1}"
if [ -n "${HITL_USER_LAYER:-}" ]; then
  for file in "$HITL_USER_LAYER"/*; do
    link=$CLAUDE_CONFIG_DIR/${file##*/}
    [ ! -e "$file" ] || [ -e "$link" ] || ln -s "$file" "$link" || exit 1
  done
  unset HITL_USER_LAYER
fi
if command -v setpriv >/dev/null 2>&1; then
  exec setpriv --pdeathsig KILL "$HITL_CLI" "$@"
fi
exec "$HITL_CLI" "$@"
