"""LaTeX drawn by matplotlib as part of the page: a formula needs no script, no font and no network to be read."""

import functools
import html
import re

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextToPath

UNITS = 100  # of an em: what TextToPath draws in
FONT = FontProperties(size=UNITS, math_fontfamily="cm")
COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
LATEX = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)


def draw_formulas(page: str) -> str:
    """The HTML of a page with a drawing in the place of what pymdownx.arithmatex found. `\\\\` begins a line."""
    return LATEX.sub(lambda found: drawn(found[1], html.unescape(found[2])), page)


def drawn(tag: str, latex: str) -> str:
    lines = [line.strip() for line in latex.split(r"\\")]
    return f'<{tag} class="formula">{"".join(map(svg, lines))}</{tag}>'


@functools.cache
def svg(latex: str) -> str:
    """One line, as wide as its letters at the size of the text around it. Raises ValueError for what mathtext, the part
    of LaTeX that matplotlib knows, does not have."""
    drawer, text = TextToPath(), f"${latex}$"
    width, height, below = drawer.get_text_width_height_descent(text, FONT, ismath=True)
    vertices, codes = drawer.get_text_path(FONT, text, ismath=True)
    size = f"width:{width / UNITS:.2f}em;height:{height / UNITS:.2f}em;vertical-align:{-below / UNITS:.2f}em"
    box = f"0 {below - height:.0f} {width:.0f} {height:.0f}"
    return (
        f'<svg role="img" viewBox="{box}" style="{size}" fill="currentColor"><title>{html.escape(latex)}</title>'
        f'<path d="{outline(Path(vertices, codes))}"/></svg>'
    )


def outline(path: Path) -> str:
    """The `d` of an SVG path, in which y points down."""
    parts = []
    for points, code in path.iter_segments(simplify=False, curves=True):
        numbers = points.reshape(-1, 2) * (1, -1) if code != Path.CLOSEPOLY else ()
        parts.append(COMMANDS[code] + " ".join(f"{x:.0f},{y:.0f}" for x, y in numbers))
    return "".join(parts)
