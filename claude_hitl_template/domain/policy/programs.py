"""Table of programs: which of them run their arguments, and how.

Everything that stands in no table may run its arguments. A program that does not run them and is missing here
costs an unnecessary question; one that does and stands under `INERT` would hide what it runs.
"""

import re

# They run no argument, nor any file, that names a command.
INERT = frozenset(
    # builtins and keywords
    {
        "echo",
        "printf",
        "cd",
        "pwd",
        "true",
        "false",
        ":",
        "exit",
        "return",
        "break",
        "continue",
        "shift",
        "set",
        "wait",
    }
    | {"export", "declare", "typeset", "readonly", "local", "unset", "read", "let", "((", "umask"}
    | {
        "for",
        "select",
        "case",
        "in",
        "type",
        "pushd",
        "popd",
        "dirs",
        "jobs",
        "kill",
        "ulimit",
        "times",
        "shopt",
    }
    # files and text
    | {
        "cat",
        "tac",
        "ls",
        "dir",
        "tree",
        "stat",
        "file",
        "du",
        "df",
        "cp",
        "mv",
        "ln",
        "mkdir",
        "rmdir",
        "rm",
        "touch",
    }
    | {
        "chmod",
        "chown",
        "chgrp",
        "readlink",
        "realpath",
        "basename",
        "dirname",
        "mktemp",
        "head",
        "tail",
        "wc",
        "cut",
    }
    | {
        "tr",
        "uniq",
        "paste",
        "join",
        "comm",
        "cmp",
        "diff",
        "fold",
        "fmt",
        "nl",
        "rev",
        "column",
        "expand",
        "od",
        "xxd",
    }
    | {
        "hexdump",
        "strings",
        "base64",
        "base32",
        "md5sum",
        "sha1sum",
        "sha256sum",
        "sha512sum",
        "cksum",
        "shasum",
        "seq",
    }
    | {
        "grep",
        "egrep",
        "fgrep",
        "rg",
        "ag",
        "sort",
        "jq",
        "tee",
        "truncate",
        "shred",
        "sync",
        "gzip",
        "gunzip",
        "zcat",
        "bzip2",
        "xz",
        "unzip",
    }
    # the machine
    | {
        "date",
        "sleep",
        "whoami",
        "id",
        "groups",
        "hostname",
        "uname",
        "uptime",
        "which",
        "whereis",
        "printenv",
        "ps",
        "pgrep",
    }
    | {
        "pkill",
        "killall",
        "free",
        "nproc",
        "lscpu",
        "lsblk",
        "lsof",
        "ss",
        "netstat",
        "ping",
        "dig",
        "nslookup",
        "host",
    }
    # compilers, formatters and the like, whose arguments are files and options
    | {
        "black",
        "ruff",
        "isort",
        "flake8",
        "mypy",
        "pyright",
        "pylint",
        "eslint",
        "prettier",
        "tsc",
        "shellcheck",
        "gofmt",
    }
    | {
        "rustfmt",
        "javac",
        "rustc",
        "clang-format",
        "yamllint",
        "jsonlint",
        "markdownlint",
        "hadolint",
        "shfmt",
    }
)

# An option by which one of those runs something after all.
RUNNING_OPTIONS = {"rg": ("--pre", "--hostname"), "sort": ("--co",), "ag": ("--pager",)}

# Their arguments may name a command (a script of theirs, an option), or else text that they run. What they are given by
# `$NAME` is not looked into: that it is a command is as likely as that a file holds one.
TOOLS = frozenset(
    {"[[", "[", "test", "find", "sed", "gsed", "awk", "gawk", "mawk", "nawk", "less", "more", "man"}
    | {
        "vi",
        "vim",
        "nvim",
        "nano",
        "emacs",
        "code",
        "tar",
        "zip",
        "rsync",
        "scp",
        "curl",
        "wget",
        "make",
        "gmake",
        "cmake",
    }
    | {
        "ninja",
        "gcc",
        "cc",
        "g++",
        "clang",
        "clang++",
        "ld",
        "go",
        "java",
        "node",
        "nodejs",
        "deno",
        "bun",
        "ruby",
        "perl",
    }
    | {
        "php",
        "lua",
        "r",
        "rscript",
        "psql",
        "mysql",
        "sqlite3",
        "redis-cli",
        "pytest",
        "tox",
        "nox",
        "coverage",
        "jest",
    }
    | {
        "vitest",
        "mocha",
        "playwright",
        "mvn",
        "gradle",
        "gradlew",
        "dotnet",
        "swift",
        "terraform",
        "open",
        "xdg-open",
        "yq",
    }
)
INTERPRETER = re.compile(r"(python|pypy|pip|node|ruby|perl|php|lua)[\d.]*t?")

# Tools whose first operand names what they do, not a program.
SUBCOMMANDS = frozenset(
    {
        "git",
        "docker",
        "podman",
        "kubectl",
        "helm",
        "npm",
        "pnpm",
        "yarn",
        "cargo",
        "pip",
        "uv",
        "poetry",
        "brew",
        "apt",
    }
    | {
        "apt-get",
        "dnf",
        "yum",
        "apk",
        "snap",
        "systemctl",
        "service",
        "journalctl",
        "gh",
        "glab",
        "aws",
        "gcloud",
        "az",
    }
    | {
        "rustup",
        "nvm",
        "pyenv",
        "conda",
        "mamba",
        "go",
        "bundle",
        "gem",
        "composer",
        "docker-compose",
        "launchctl",
    }
)
# A word after which any tool may run what follows.
HANDS_ON = frozenset(
    {
        "exec",
        "run",
        "x",
        "dlx",
        "shell",
        "call",
        "create",
        "init",
        "tool",
        "run-script",
        "bisect",
        "foreach",
        "ssh",
    }
    | {"-c", "-e", "--exec", "--exec-batch", "--call", "--eval", "--", "-exec", "-execdir", "-ok", "-okdir"}
)

# What git does under these names is fixed, and what they are given is text, files and revisions.
GIT_INERT = frozenset(
    {"add", "am", "annotate", "apply", "blame", "branch", "cat-file", "check-ignore", "checkout", "cherry"}
    | {
        "cherry-pick",
        "clean",
        "commit",
        "count-objects",
        "describe",
        "diff",
        "diff-tree",
        "format-patch",
        "fsck",
        "gc",
    }
    | {
        "hash-object",
        "init",
        "log",
        "ls-files",
        "ls-tree",
        "merge",
        "merge-base",
        "mv",
        "name-rev",
        "notes",
        "reflog",
    }
    | {
        "reset",
        "restore",
        "rev-list",
        "rev-parse",
        "revert",
        "rm",
        "shortlog",
        "show",
        "show-ref",
        "stash",
        "status",
    }
    | {"switch", "symbolic-ref", "tag", "update-index", "version", "whatchanged", "worktree", "write-tree"}
)
# Text that they are given may be run by them, but only with an option that says so.
GIT_REMOTE = frozenset({"push", "pull", "fetch", "clone", "ls-remote", "remote", "config", "grep", "help"})

# They run what follows their options and so many operands: the operands, options with a value, and options without.
WRAPPERS: dict[str, tuple[int, str, str]] = {
    "sudo": (0, "ugprthCDRTU", "AbEeHnPSsikKlvVN"),
    "doas": (0, "uC", "nLs"),
    "env": (0, "uC", "i0v"),
    "command": (0, "", "pvV"),
    "builtin": (0, "", ""),
    "exec": (0, "a", "cl"),
    "nohup": (0, "", ""),
    "time": (0, "fo", "pvaqVl"),
    "timeout": (1, "ks", "vfp"),
    "nice": (0, "n", ""),
    "ionice": (0, "cnpPu", "t"),
    "stdbuf": (0, "ioe", ""),
    "setsid": (0, "", "cfw"),
    "taskset": (1, "", "ac"),
    "chrt": (1, "TPD", "abdfiorRmv"),
    "caffeinate": (0, "tw", "disum"),
    "noglob": (0, "", ""),
    "nocorrect": (0, "", ""),
    "coproc": (0, "", ""),
    "xargs": (0, "nILPsdEaJRS", "0rtpxo"),
}

# They give text to a shell: a later word, or all of them together.
SHELL_TEXT = frozenset(
    {
        "ssh",
        "su",
        "runuser",
        "watch",
        "script",
        "parallel",
        "flock",
        "sg",
        "at",
        "batch",
        "tmux",
        "screen",
        "xterm",
        "env",
    }
    | {"osascript", "expect", "entr", "systemd-run", "pkexec", "runas", "wsl", "adb", "vagrant"}
)
SHELL = re.compile(r"(ba|da|z|k|mk|pdk|a|fi|c|tc|rba|ya|po|pw)?sh(-?[\d.]+)?")

# Shells run the file that these name.
SHELL_FILES = re.compile(r"(BASH_ENV|ZDOTDIR|BASH_FUNC_.*)\+?=")

# Builtins that evaluate the subscript of a name that they are given.
SUBSCRIPTS = frozenset(
    {"let", "((", "declare", "typeset", "local", "readonly", "export", "read", "unset", "printf"}
)
DECLARES = frozenset({"export", "declare", "typeset", "local", "readonly"})

# They only compare, so that what they read is not run.
QUIET_TOOLS = frozenset({"[[", "[", "test", "find", "less", "more", "man", "zip", "open"})

# What needs a value among the options that stand before a subcommand; the value is no subcommand.
VALUES: dict[str, frozenset[str]] = {
    "git": frozenset(
        {"-C", "-c", "--git-dir", "--work-tree", "--namespace", "--config-env", "--attr-source"}
    ),
    "kubectl": frozenset(
        {"-n", "--namespace", "--context", "--kubeconfig", "--cluster", "--user", "-s", "--server"}
    ),
    "docker": frozenset({"-H", "--host", "--context", "--config", "-l", "--log-level"}),
    "helm": frozenset({"-n", "--namespace", "--kube-context", "--kubeconfig"}),
    "npm": frozenset({"--prefix", "-C", "-w", "--workspace"}),
}
# What may stand there without a value.
GIT_FLAGS = frozenset(
    {
        "-p",
        "-P",
        "--paginate",
        "--no-pager",
        "--bare",
        "--no-replace-objects",
        "--no-optional-locks",
        "--literal-pathspecs",
    }
    | {"--no-lazy-fetch", "--no-advice", "--version", "--help", "-v", "-h", "--html-path", "--exec-path"}
)
