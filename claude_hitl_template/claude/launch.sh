#!/bin/sh
# Starts the Claude Code CLI ($HITL_CLI) for one session, given to the SDK as its cli_path.
#
# - The agent's environment is a closed list: the variables that $HITL_KEEP names, all of them set by whoever started
#   this, and those of the operating system below. Keys and tokens of the service's own process do not pass, nor does
#   what an operator set for a CLI of their own (CLAUDE_CODE_USE_BEDROCK, CLAUDE_CODE_SHELL_PREFIX and the like).
# - The CLI dies with the process that started it, so that no agent goes on unattended (Linux only: setpriv).
# - SHLVL is there: without it bash takes the CLI's sockets for a remote shell's and reads ~/.bashrc before each command,
#   which took 300 ms where pyenv is set up.
# - In an image, the user layer ($HITL_USER_LAYER) is put into the CLI's config folder: the SDK makes an empty one whenever
#   it resumes. As links: the agent can write in its config folder, and not in the layer.
for name in $(env | sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p'); do
  case $name in
    PATH | HOME | PWD | USER | LOGNAME | SHELL | LANG | LC_* | TZ | TERM | TMPDIR | SHLVL) ;;
    HITL_CLI | HITL_KEEP | HITL_USER_LAYER) ;;
    *)
      case " ${HITL_KEEP:-} " in
        *" $name "*) ;;
        *) unset "$name" ;;
      esac
      ;;
  esac
done
unset HITL_KEEP
export SHLVL="${SHLVL:-1}"
if [ -n "${HITL_USER_LAYER:-}" ]; then
  for file in "$HITL_USER_LAYER"/*; do
    link=${CLAUDE_CONFIG_DIR:?}/${file##*/}
    [ ! -e "$file" ] || [ -e "$link" ] || ln -s "$file" "$link" || exit 1
  done
  unset HITL_USER_LAYER
fi
set -- "$HITL_CLI" "$@"
unset HITL_CLI
if command -v setpriv >/dev/null 2>&1; then
  set -- setpriv --pdeathsig KILL "$@"
fi
# Names that are no identifiers, such as those of functions that a bash exports, cannot be unset in here.
while IFS= read -r name; do
  [ -z "$name" ] || set -- -u "$name" "$@"
done <<NAMES
$(env | sed -n 's/^\([^=]*[^A-Za-z0-9_=][^=]*\)=.*/\1/p')
NAMES
exec env "$@"
