"""Command lines that run a given program in many spellings, and shells in which they really run.

`Lines` makes them from a seed. `Shells` runs them with stand-ins for the programs, which write down how they were
called. Nothing outside the given folder is on the search path but harmless tools.
"""

import contextlib
import os
import random
import select
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = [
    "awk",
    "bash",
    "basename",
    "cat",
    "chmod",
    "cp",
    "cut",
    "dash",
    "dirname",
    "env",
    "expr",
    "false",
    "find",
    "grep",
    "head",
    "id",
    "ln",
    "ls",
    "mkdir",
    "mv",
    "nice",
    "nohup",
    "perl",
    "printf",
    "prlimit",
    "python3",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sleep",
    "sort",
    "stdbuf",
    "tail",
    "tee",
    "timeout",
    "touch",
    "tr",
    "true",
    "uniq",
    "wc",
    "xargs",
    "chrt",
    "flock",
    "script",
    "taskset",
    "setarch",
    "ionice",
]
STAND_INS = ("git", "kubectl", "npm", "rm", "curl")

# One write a call: calls may run side by side.
_STAND_IN = """#!{shell}
call=
for word in "${{0##*/}}" "$@"; do call="$call$word{end}"; done
printf '%s\\n' "$call" >>{record}
"""
_END_OF_WORD = "\x1f"


class Shells:
    """Runs lines one by one. Not thread-safe."""

    def __init__(self, folder: Path, patience: float = 60) -> None:
        self.patience = patience  # seconds after which a line that does not end is killed
        self.record = folder / "record"
        self.bin = folder / "bin"
        self.work = folder / "work"
        self.home = folder / "home"
        for made in (self.bin, self.work, self.home):
            made.mkdir(parents=True)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        for name in STAND_INS:
            stand_in = self.bin / name
            stand_in.write_text(
                _STAND_IN.format(
                    shell=shutil.which("dash"), end=_END_OF_WORD, record=shlex.quote(str(self.record))
                )
            )
            stand_in.chmod(0o755)

    def run(self, shell: str, line: str) -> list[list[str]]:
        """Returns the calls of the stand-in programs, once all processes that the line started have ended."""
        shutil.rmtree(self.work)
        self.work.mkdir()
        self.record.write_bytes(b"")
        env = {"PATH": str(self.bin), "HOME": str(self.home), "LC_ALL": "C.UTF-8"}
        # Whatever the line leaves running keeps the pipe open.
        reading, writing = os.pipe()
        with subprocess.Popen(
            [self.bin / shell, "-c", line],
            cwd=self.work,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writing,),
            start_new_session=True,
        ) as process:
            os.close(writing)
            select.select([reading], [], [], self.patience)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        os.close(reading)
        calls = self.record.read_text(errors="replace").split(_END_OF_WORD + "\n")
        return [call.split(_END_OF_WORD) for call in calls if call]


@dataclass(frozen=True)
class Guarded:
    """A rule's pattern, and a command that it covers."""

    pattern: str
    words: tuple[str, ...]

    def ran(self, calls: Sequence[Sequence[str]]) -> bool:
        return any(self._is(call) for call in calls)

    def _is(self, call: Sequence[str]) -> bool:
        """Whether the program received the pattern's words, preceded by nothing except options and their values."""
        program, *wanted = self.pattern.split()
        words = list(call)
        for option in ("-C", "-c"):  # what follows them is their value
            while option in words:
                del words[words.index(option) : words.index(option) + 2]
        if words[:1] != [program] or not set(wanted) <= set(words):
            return False
        before = words[1 : max([words.index(word) for word in wanted], default=0)]
        return all(word[:1] == "-" or words[at][:1] == "-" for at, word in enumerate(before))


GUARDED = (
    Guarded("git push", ("git", "push", "origin")),
    Guarded("kubectl delete", ("kubectl", "delete", "pod", "x")),
    Guarded("npm publish", ("npm", "publish")),
    Guarded("rm -rf", ("rm", "-rf", "y")),
    Guarded("curl", ("curl", "http://x")),
)

NOISE = (
    "true",
    "echo a",
    "echo 'a;b'",
    'echo "it\'s"',
    "echo it\\'s",
    'echo \\"',
    "x=1",
    "x='a b'",
    "cat <<'E'\ndon't \"\nE",
    "cat <<E\n$HOME (\nE",
    "cat <<-E\n\ta\n\tE",
    "# it's a comment",
    "echo a#b",
    "echo ${x:-y}",
    'echo "${x:-y}"',
    "echo $((1+2))",
    "for i in a b; do :; done",
    "case a in b) echo;; *) :;; esac",
    "f() { echo f; }",
    "if true; then :; fi",
    "echo a >o",
    "echo a 2>&1",
    "[ a = b ]",
    "mkdir -p d",
    "printf '%s\\n' a",
    "echo {a,b}",
    "echo *",
    "cd .",
)


# What may stand between two words.
BETWEEN = ("  ", "\t", " \\\n", " 2>/dev/null ", " >o ", " 2>&1 ", " </dev/null ", " >>o ", " &>o ", " >|o ")
BETWEEN += (
    " -q ",
    " --opt=v ",
    " -C d ",
    " -c a.b=c ",
    ' -C "$PWD" ',
    " -C 'my dir' ",
    " --no-pager ",
    " -C $HOME ",
)
BETWEEN += (" -n ${N:-1} ",)
# What runs the command after it.
WRAPPERS = """
env
env A=1
env -u B
env A='x y'
nohup
timeout 5
timeout -k 1 5
nice
nice -n 5
nice -5
stdbuf -oL
setsid -w
command
exec
prlimit
chrt -o 0
taskset 1
flock l
setarch -R
ionice
timeout --signal=9 5
time
time -p
command -p --
t=5; timeout $t
t=5; timeout "$t"
w=env; $w
xargs
echo | xargs
xargs -n1
xargs -I{}
echo a b | xargs -n 1
script -qc true; env
!
coproc
w='timeout 5'; $w
nohup env nice
eval
exec 3>o;
builtin command
""".strip().splitlines()


class Lines:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def line(self, guarded: Guarded) -> str:
        text = self._command(list(guarded.words))
        for _ in range(self.random.choice((0, 0, 1, 1, 1, 2, 2, 3))):
            text = self.random.choice(self._around)(self, text)
        return text

    def mutated(self, guarded: Guarded) -> str:
        """Returns a line with a few characters added, removed or replaced."""
        text = list(self.line(guarded))
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randrange(len(text) + 1)
            text[at : at + self.random.choice((0, 0, 1))] = self.random.choice(
                [
                    *" \n\t'\"`$\\;&|<>(){}#=!*?[]~-a",
                    "&&",
                    "||",
                    "$(",
                    "${",
                    "<<",
                    "\\\n",
                    "\r",
                    "\\ ",
                    " #",
                    "\u00a0",
                    "",
                ]
            )
        return "".join(text)

    # -- one word, one command

    def _word(self, word: str, *, is_program: bool = False) -> str:
        ways: list[Callable[[str], str]] = [
            lambda w: f"'{w}'",
            lambda w: f'"{w}"',
            lambda w: f"{w[0]}''{w[1:]}",
            lambda w: f'{w[:-1]}"{w[-1]}"',
            lambda w: f"\\{w}",
            lambda w: f"{w[0]}\\\n{w[1:]}",
            lambda w: f"$'{w}'",
            lambda w: f"$'\\x{ord(w[0]):02x}{w[1:]}'",
            lambda w: f"${{Q:-{w}}}",
            lambda w: f'"${{Q:-{w}}}"',
            lambda w: f"$(echo {w})",
            lambda w: f'"$(echo {w})"',
            lambda w: f"`echo {w}`",
            lambda w: f'"$(printf %s {w})"',
            lambda w: f"${{Q}}{w}",
            lambda w: f"{w[0]}$Q{w[1:]}",
            lambda w: f"{w}$Q",
            lambda w: f"{{{w},}}",
            lambda w: f"$(cat <<E\n{w}\nE\n)",
        ]
        if is_program:
            ways += [
                lambda w: f"../bin/{w}",
                lambda w: f"../bin/{w[:-1]}?",
                lambda w: f"../b*/{w}",
                lambda w: f"$PWD/../bin/{w}",
            ]
        return word if self.random.random() < 0.65 else self.random.choice(ways)(word)

    def _between(self) -> str:
        if self.random.random() < 0.75:
            return " "
        return self.random.choice(BETWEEN)

    def _command(self, words: list[str]) -> str:
        text = self._word(words[0], is_program=True)
        for word in words[1:]:
            text += self._between() + self._word(word)
        prefixes = [
            "A=1 ",
            'A="x y" ',
            "A='x y' ",
            "A=$HOME/c ",
            "A=$(echo x) ",
            "A= ",
            "A+=x ",
            ">o ",
            "2>/dev/null ",
            "A=\\  ",
            "A=${x} ",
        ]
        return "".join(self.random.sample(prefixes, self.random.choice((0, 0, 0, 1, 1, 2)))) + text

    # -- what stands around it

    def _wrap(self, text: str) -> str:
        before = self.random.choice(WRAPPERS)
        return f"{before} {text}"

    def _shell(self, text: str) -> str:
        quoted = shlex.quote(text)
        ways = [
            f"{sh} {options} {quoted}"
            for sh in ("bash", "sh", "dash")
            for options in ("-c", "-ec", "-xc", "-u -c", "-c --")
        ]
        ways += [
            f"eval {quoted}",
            f"trap {quoted} EXIT",
            f"trap -- {quoted} 0",
            f"bash <<< {quoted}",
            f"echo {quoted} | sh",
        ]
        ways += [
            f"printf '%s\\n' {quoted} | bash -s",
            f"sh <<'X'\n{text}\nX",
            f"bash -s <<'X'\n{text}\nX",
            f"cat <<'X' | sh\n{text}\nX",
        ]
        ways += [
            f"source <(echo {quoted})",
            f". /dev/stdin <<< {quoted}",
            f"find . -maxdepth 0 -exec sh -c {quoted} \\;",
        ]
        ways += [
            f'x={quoted}; eval "$x"',
            f'x={quoted}; bash -c "$x"',
            f"echo {quoted} | xargs -0 sh -c",
            f"echo {quoted} >s; sh s",
        ]
        ways += [
            f"env -S {shlex.quote('sh -c ' + quoted)}",
            f"cat >s.sh <<'X'\n{text}\nX\n. ./s.sh",
            f"flock l -c {quoted}",
        ]
        ways += [
            f"bash -c 'eval \"$1\"' _ {quoted}",
            f'set -- {quoted}; sh -c "$@"',
            f"shopt -s expand_aliases\nalias g={quoted}\ng",
        ]
        ways += [f"python3 -c 'import os; os.system({text!r})'" if not set(text) & set("'\\`$*?") else text]
        ways += [
            f"echo {quoted} | tee s | cat; bash ./s",
            f"awk 'BEGIN{{system(\"{text}\")}}'" if not set(text) & set("'\"\\\n`$*?") else text,
        ]
        return self.random.choice(ways)

    def _nest(self, text: str) -> str:
        ways = [
            f"echo $({text})",
            f'echo "$({text})"',
            f"x=$({text})",
            f"cat <<E\n$({text})\nE",
            f"cat <({text})",
            f"echo >(  {text} )",
        ]
        ways += [
            f'[ -n "$({text})" ]',
            f"[[ -z $({text}) ]]",
            f"(( x = $({text}) + 1 ))",
            f"echo $(( $({text}) + 1 ))",
            f"a=(1 $({text}))",
        ]
        ways += [
            f"case $({text}) in a) :;; esac",
            f"for i in $({text}); do :; done",
            f'echo "${{x:-$({text})}}"',
            f"echo ${{x:-$({text})}}",
        ]
        ways += [
            f"cat <<< $({text})",
            f"cat < <({text})",
            f"export x=$({text})",
            f"local x=$({text})",
            f"x[$({text})]=1",
            f"echo a >$({text})",
        ]
        ways += [
            f"echo `{text}`" if not set(text) & set("`\\") else text,
            f'echo "`{text}`"' if not set(text) & set('`\\"') else text,
        ]
        return self.random.choice(ways)

    def _structure(self, text: str) -> str:
        ways = [
            f"({text})",
            f"( {text} )",
            f"{{ {text}\n}}",
            f"if {text}\nthen :; fi",
            f"if true; then {text}\nfi",
            f"if false; then :; else {text}\nfi",
        ]
        ways += [
            f"while {text}\ndo break; done",
            f"for i in 1; do {text}\ndone",
            f"case a in a) {text}\n;; esac",
            f"case a in (b|a) {text}\nesac",
        ]
        ways += [
            f"f() {{ {text}\n}}; f",
            f"f() ( {text}\n)\nf",
            f"function f {{ {text}\n}}\nf",
            f"until {text}\ndo break; done",
            f"! {text}",
        ]
        ways += [
            f"{text} | cat",
            f"true | {text}",
            f"true && {text}",
            f"false || {text}",
            f"{text} &",
            f"{text} & wait",
            f"true |& {text}",
        ]
        ways += [
            f"for ((i=0;i<1;i++)); do {text}\ndone",
            f"select i in a; do {text}\nbreak; done <<< 1",
            f"{{ {text}\n}} >o 2>&1",
            f"true &>o; {text}",
        ]
        ways += [
            f"true\n{text}",
            f"true;{text}",
            f"true&{text}",
            f"false||{text}",
            f"true&&\n{text}",
            f"true # x\n{text}",
            f"{text} # x",
            f"true &>o {text}",
        ]
        return self.random.choice(ways)

    def _noise(self, text: str) -> str:
        noise = self.random.choice(NOISE)
        joint = (
            "\n"
            if "\n" in noise or "#" in noise
            else self.random.choice(("\n", "; ", " && ", " || ", "\n\n", " & "))
        )
        return f"{noise}{joint}{text}" if self.random.random() < 0.7 else f"{text}\n{noise}"

    def _pass(self, text: str) -> str:
        """Passes the program through variables, parameters and functions."""
        words = text.split(" ")
        first, rest = words[0], " ".join(words[1:])
        ways = [
            f"x='{first}'; $x {rest}",
            f'x="{first}"; "$x" {rest}',
            f'f() {{ "$@"; }}; f {text}',
            f"f() {{ $1 $2; }}; f {text}",
        ]
        ways += [
            f'f() {{ env "$@"; }}; f {text}',
            f'set -- {text}; "$@"',
            f'a=({text}); "${{a[@]}}"',
            f"read x <<< '{text}'; $x",
        ]
        ways += [
            f"for p in {first}; do $p {rest}; done",
            f'for p in {first}; do env "$p" {rest}; done',
            f"printf -v x %s '{first}'; $x {rest}",
        ]
        ways += [
            f"shopt -s expand_aliases\nalias g={first}\ng {rest}",
            f'{first}2() {{ command {first} "$@"; }}; {first}2 {rest}',
        ]
        ways += [
            f"echo {rest} | xargs {first}",
            f"echo {rest} | xargs -I% env {first} %",
            f"find . -maxdepth 0 -exec {text} \\;",
            f"x=: y={first}; $y {rest}",
        ]
        ways += [f"hash -p ../bin/{first} g; g {rest}", f"eval {first} {rest}", f"git -c alias.p='!{text}' p"]
        return self.random.choice(ways) if "'" not in text and "\n" not in text else text

    _around = (_wrap, _wrap, _shell, _shell, _nest, _structure, _structure, _noise, _noise, _pass)
