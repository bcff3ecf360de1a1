"""Makes docs/images/terminal.svg of the screens that tests/contract/test_terminal.py keeps, shown one after the other.

Run after that test: `.venv/bin/python -m tools.recording`.
"""

import re
from html import escape
from pathlib import Path

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import MONOKAI, TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[1]
SCREENS = ROOT / "test-artifacts" / "terminal"
TARGET = ROOT / "docs" / "images" / "terminal.svg"
WIDTH, ROWS = 60, 30
FRAMES = ("60-01-call", "60-05-edited", "60-06-allowed", "60-12-answered", "60-15-help")
FRAME_S = 4.0
CHAR_W, LINE_H, FONT, PAD = 8.4, 18, 14, 14
THEME: TerminalTheme = MONOKAI


def frame(name: str) -> list[list[Segment]]:
    """The last rows of a screen with their colours, without paths of the machine that it was taken on."""
    text = (SCREENS / f"{name}.ansi").read_text().rstrip()
    text = re.sub(r"/tmp/\S*?/workspaces/(sesn_\w{6})\w*\n?\w*", r"~/.hitl/workspaces/\1...", text)  # noqa: S108
    text = re.sub(
        r"http://127\.0\.0\.1:\d+/claude-hitl/inbox/a/(appr_\w{6})\w*\n?\w*", r"/inbox/a/\1...", text
    )
    rows = text.splitlines()[-ROWS:]
    console = Console(width=WIDTH, color_system="truecolor", force_terminal=True)
    return [list(console.render(Text.from_ansi(row), console.options)) for row in rows]


def drawn(rows: list[list[Segment]]) -> str:
    """A frame as SVG text elements."""
    lines: list[str] = []
    for number, row in enumerate(rows, start=1):
        spans, column = "", 0
        for text, style, _ in row:
            shown = text.rstrip("\n")
            if shown.strip():
                x = PAD + column * CHAR_W
                spans += f'<tspan x="{x:.1f}" {_look(style)}>{escape(shown)}</tspan>'
            column += len(shown)
        lines.append(f'<text y="{PAD + number * LINE_H}">{spans}</text>' if spans else "")
    return "".join(lines)


def _look(style: Style | None) -> str:
    style = style or Style.null()
    colour = THEME.foreground_color if style.color is None else style.color.get_truecolor(THEME)
    weight = ' font-weight="bold"' if style.bold else ""
    faint = ' opacity="0.65"' if style.dim else ""
    return f'fill="{colour.hex if hasattr(colour, "hex") else "#{:02x}{:02x}{:02x}".format(*colour)}"{weight}{faint}'


def recording(names: tuple[str, ...]) -> str:
    """The frames as one picture, of which each is visible in turn."""
    width, height = round(2 * PAD + WIDTH * CHAR_W), 2 * PAD + (ROWS + 1) * LINE_H
    share = 100 / len(names)
    css = f"g.f{{opacity:0;animation:turn {FRAME_S * len(names):g}s step-end infinite}}"
    css += f"@keyframes turn{{0%{{opacity:1}}{share:g}%{{opacity:0}}}}"
    css += "@media (prefers-reduced-motion:reduce){g.f{animation:none}g.f:first-of-type{opacity:1}}"
    groups = "".join(
        f'<g class="f" style="animation-delay:{number * FRAME_S:g}s">{drawn(frame(name))}</g>\n'
        for number, name in enumerate(names)
    )
    font = f'font-family="ui-monospace,Menlo,Consolas,monospace" font-size="{FONT}" xml:space="preserve"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {font}>\n'
        f"<style>{css}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#1e1e1e"/>\n{groups}</svg>\n'
    )


if __name__ == "__main__":
    TARGET.write_text(recording(FRAMES))
    print(f"wrote {TARGET}, {TARGET.stat().st_size} bytes")
