"""One look for every figure, and one colour per rank in every figure, cell output and slide.

Taught nowhere, used everywhere. A notebook calls `use_style()` in its set-up cell.
Importing this module does not import matplotlib, so `workshop_utils.ranks` may read the colours for HTML.
"""

from pathlib import Path

# Blue, orange, green, crimson, violet, brown, orchid, grey. Chosen by search: every pair stays apart
# (Oklab distance 0.097 or more) for normal sight, protanopia, deuteranopia and tritanopia, and every colour has
# a contrast of 3:1 or more on white and on #1e1e1e, so one list serves plots and HTML borders, light and dark.
RANK_COLORS = ("#1d6db0", "#e86b05", "#2ba667", "#c4217a", "#9623f9", "#955d1e", "#d164f2", "#9088ae")

INK = "#26262e"  # text and lines
MUTED = "#8a8a94"  # axes, grid, what stays in the background
PAPER = "#f1f1f4"  # fill of a box that belongs to no rank

STYLE_FILE = Path(__file__).resolve().parent.parent / "workshop.mplstyle"

_enlargement = 1.0  # what `large_fonts` asks for


def rank_color(rank: int) -> str:
    """The hex colour of `rank`. From the ninth rank on the colours repeat, so a figure also writes the number."""
    return RANK_COLORS[rank % len(RANK_COLORS)]


def use_style() -> None:
    """Make every matplotlib figure drawn from now on look like the workshop's."""
    import matplotlib.pyplot as plt

    plt.style.use(STYLE_FILE)
    for name in ("figure.dpi", "savefig.dpi"):
        plt.rcParams[name] *= _enlargement


def enlarge(factor: float) -> None:
    """Draw figures `factor` times as large from now on, letters and lines too, so that nothing overlaps."""
    global _enlargement
    _enlargement = factor
    use_style()


def draw_box(
    ax, x, y, width, height, label, *, color=PAPER, edge=MUTED, text_color=INK, fontsize=9, linestyle="-"
):
    """A labelled rectangle centred on (x, y), in data units of `ax`. Returns the patch."""
    from matplotlib.patches import FancyBboxPatch

    pad = 0.12 * min(width, height)
    box = FancyBboxPatch(
        (x - width / 2 + pad, y - height / 2 + pad),
        width - 2 * pad,
        height - 2 * pad,
        boxstyle=f"round,pad={pad}",
        facecolor=color,
        edgecolor=edge,
        linestyle=linestyle,
    )
    ax.add_patch(box)
    ax.text(x, y, label, ha="center", va="center", color=text_color, fontsize=fontsize)
    return box
