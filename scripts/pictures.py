"""The pictures of docs/how-it-works.md: `python -m scripts.pictures` writes them into docs/assets.

Plain SVG with a background of its own, so that they can be read on light and dark pages, and without a network.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
INK, LINE, PAPER = "#1f2937", "#6b7280", "#ffffff"
SEED, RECEIVER, PLANNER, STORAGE = "#dcfce7", "#dbeafe", "#fef3c7", "#e5e7eb"
#: Imports, weights, compilation and graphs, everything else.
PARTS = ("#cbd5e1", "#2563eb", "#f59e0b", "#e2e8f0")


def text(x: float, y: float, words: str, *, size: int = 14, anchor: str = "middle", bold: bool = False) -> str:
    """One line of text; ``anchor`` is SVG's start, middle or end."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, *lines: str) -> str:
    """A rounded box with centred lines, the first one bold."""
    first = y + height / 2 + 5 - 9 * (len(lines) - 1)
    words = "".join(text(x + width / 2, first + 18 * row, line, bold=row == 0) for row, line in enumerate(lines))
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{LINE}"/>'
    return shape + words


def arrow(points: str, *, wide: bool = False) -> str:
    """A line with a head at its end through ``points``, SVG's list of coordinates; wide for bytes of weights."""
    width, head = (5, "wide") if wide else (1.5, "thin")
    style = f'stroke="{PARTS[1] if wide else INK}" stroke-width="{width}" marker-end="url(#{head})"'
    return f'<polyline points="{points}" fill="none" {style}/>'


def picture(width: int, height: int, title: str, *parts: str) -> str:
    """A whole SVG file."""
    head = '<marker id="{}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="{}" markerHeight="{}" orient="auto">'
    heads = "".join(
        head.format(name, size, size) + f'<path d="M0 0L10 5L0 10z" fill="{fill}"/></marker>'
        for name, size, fill in (("thin", 8, INK), ("wide", 3, PARTS[1]))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" '
        f'font-family="system-ui, sans-serif" fill="{INK}">\n<title>{escape(title)}</title>\n<defs>{heads}</defs>\n'
        f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def fork() -> str:
    """Receiver, planner and seed, and what passes between them."""
    return picture(
        760,
        310,
        "One fork: a lease from the planner, the manifest and the weights from the seed",
        box(290, 20, 180, 60, PLANNER, "planner", "pairs workers"),
        box(40, 190, 190, 90, RECEIVER, "receiver", "a starting worker", "becomes a seed"),
        box(530, 190, 190, 90, SEED, "seed", "a running worker", "serves requests"),
        arrow("110,190 110,50 282,50"),
        text(122, 110, "1  a seed for my key?", anchor="start"),
        text(122, 130, "2  a lease", anchor="start"),
        arrow("650,190 650,50 478,50"),
        text(640, 110, "announce, heartbeat", anchor="end"),
        arrow("530,208 238,208"),
        text(384, 200, "3  manifest: tensors, addresses, digests"),
        arrow("530,240 246,240", wide=True),
        text(384, 232, "4  weights, read by a transfer engine"),
        text(384, 270, "5  digests are verified on the receiver"),
    )


def load() -> str:
    """The decision between a fork and storage."""
    return picture(
        760,
        300,
        "A load: fork and verify, or load from storage",
        box(20, 100, 130, 60, RECEIVER, "start", "key, fingerprint"),
        box(200, 100, 130, 60, PLANNER, "lease?", "asks, may wait"),
        box(380, 20, 130, 60, SEED, "fork", "compare, read"),
        box(560, 20, 170, 60, SEED, "verified", "digests, epoch"),
        box(380, 210, 130, 60, STORAGE, "storage", "default loader"),
        box(560, 110, 170, 60, RECEIVER, "the model", "serves, is a seed"),
        arrow("150,130 192,130"),
        arrow("265,100 265,50 372,50"),
        text(256, 76, "yes", anchor="end"),
        arrow("265,160 265,240 372,240"),
        text(256, 206, "no", anchor="end"),
        arrow("510,50 552,50"),
        arrow("645,80 645,102"),
        arrow("445,80 445,202"),
        text(437, 150, "any failure", anchor="end"),
        arrow("510,240 645,240 645,178"),
    )


def fleet() -> str:
    """Waves of forks, as seeds become more; each seed has two slots, so that the picture stays small."""
    workers = [(60, 130), (250, 70), (250, 190), *((470, 38 + 40 * row) for row in range(6))]
    parts = [text(30, 26, "Two slots for each seed in this picture; four are the default.", anchor="start")]
    for (x, y), source in zip(workers, (None, 0, 0, 1, 1, 0, 0, 2, 2), strict=True):
        if source is not None:
            from_x, from_y = workers[source]
            parts.append(arrow(f"{from_x + 90},{from_y + 16} {x - 6},{y + 16}", wide=True))
        parts.append(box(x, y, 90, 32, STORAGE if source is None else SEED, "storage" if source is None else "fork"))
    captions = {105: "first worker", 295: "first wave: one seed", 515: "second wave: three seeds", 680: "nine seeds, …"}
    parts += [text(x, 296, words) for x, words in captions.items()]
    return picture(760, 310, "Workers that start together: one reads storage, the others fork in waves", *parts)


def start() -> str:
    """The seconds of docs/benchmarks.md, "Start-up": imports, weights, init engine, the rest."""
    rows = (
        ("default loader, empty caches", 105.4, (20.0, 3.58, 53.7)),
        ("first instance, warm caches", 51.1, (23.8, 3.39, 15.4)),
        ("fork, empty caches, rfork_caches=code", 50.3, (27.9, 0.26, 13.7)),
    )
    parts = []
    for row, (name, total, seconds) in enumerate(rows):
        y, x = 40 + 70 * row, 20.0
        parts.append(text(20, y - 8, name, anchor="start", bold=True))
        for each, fill in zip((*seconds, total - sum(seconds)), PARTS, strict=True):
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{max(each * 6, 1.5):.1f}" height="26" fill="{fill}"/>')
            x += each * 6
        parts.append(text(x + 8, y + 18, f"{total:g} s", anchor="start"))
    for column, (name, fill) in enumerate(zip(("imports", "weights", "compile, graphs", "other"), PARTS, strict=True)):
        x = 20 + 150 * column
        parts.append(f'<rect x="{x}" y="248" width="14" height="14" fill="{fill}" stroke="{LINE}"/>')
        parts.append(text(x + 20, 260, name, anchor="start"))
    return picture(760, 280, "Seconds from process start to first token, 15.2 GB on one H200", *parts)


PICTURES = {"fork": fork, "load": load, "fleet": fleet, "start": start}


def main() -> None:
    """Write all pictures."""
    ASSETS.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (ASSETS / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
