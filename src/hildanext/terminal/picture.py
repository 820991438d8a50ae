"""A picture of a decode: one row per pass (PNG, SVG) or one frame per pass (GIF).

A drawing is a list of boxes with text. Pillow paints them with the font that comes with matplotlib.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from hildanext.decoding.events import Step
from hildanext.errors import UsageError
from hildanext.files import atomic_open
from hildanext.terminal.cells import Cell, with_deleted

FORMATS = (".png", ".svg", ".gif")
SIZE = 14  # font size, in pixels of the drawing
CHAR = SIZE * 1233 / 2048  # character width of DejaVu Sans Mono
ROW, PAD, MARGIN, GUTTER = 26, 5, 22, 84
COLUMNS = 76  # characters per line of the animation
SHARP = 2  # image pixels per pixel of the drawing
PASS_MS, LAST_MS = 450, 4000

Color = tuple[int, int, int]
PAPER, FAINT, DIM, INK, BRIGHT = (13, 17, 23), (33, 39, 49), (118, 128, 142), (205, 213, 222), (255, 255, 255)
DRAFT_LOW, DRAFT_HIGH, EDIT = (18, 60, 62), (24, 150, 128), (196, 62, 142)
INSERT, DELETE = (42, 98, 196), (168, 48, 44)


class Box(NamedTuple):
    """A rounded rectangle with text: filled unless `fill` is None; if `width` is 0, the text starts at `x`."""

    x: float
    y: float
    width: float
    text: str
    ink: Color
    fill: Color | None = None


class Drawing(NamedTuple):
    width: float
    height: float
    rows: list[list[Box]]  # heading, then one row per pass (`stepped`) or the whole text (`frames`), then a line


class Decode(NamedTuple):
    """The input of a drawing: the prompt, each pass with its cells, and a line with the cost."""

    prompt: str
    passes: list[tuple[Step, list[Cell]]]
    cost: str
    verifies: bool = False  # each pass shows what it added: accepted drafts, a correction, the base's own word


def check_format(path: str | Path) -> None:
    """Raise UsageError if the file name does not end in .png, .svg or .gif."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: the name of a picture file must end in {', '.join(FORMATS)}")


def draw(decode: Decode, path: Path) -> None:
    """Write the picture in the format that the file's name gives, atomically."""
    check_format(path)
    kind = path.suffix.lower()
    if kind == ".svg":
        with atomic_open(path) as file:
            file.write(as_svg(stepped(decode)))
        return
    with atomic_open(path, "wb") as file:
        if kind == ".png":
            paint(stepped(decode)).save(file, "PNG", optimize=True)
        else:
            save_animation([paint(frame) for frame in frames(decode)], file)


# --- Drawings


def mix(low: Color, high: Color, share: float) -> Color:
    """Interpolate between two colours; share 0 is `low`, 1 is `high`."""
    red, green, blue = (round(a + (b - a) * min(max(share, 0.0), 1.0)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def look(cell: Cell) -> tuple[Color, Color | None]:
    """Return a cell's (ink, fill): masks faint, drafts tinted by confidence, edits fading, others plain.

    Inserted masks and deleted tokens have colours of their own.
    """
    if cell.kind == "mask":
        return DIM, FAINT
    if cell.kind in ("inserted", "deleted"):
        return BRIGHT, INSERT if cell.kind == "inserted" else DELETE
    if cell.kind == "drafted":
        return BRIGHT, mix(DRAFT_LOW, DRAFT_HIGH, cell.strength)
    if cell.kind == "edited":
        return BRIGHT, mix(PAPER, EDIT, cell.strength)
    return (DIM if cell.kind in ("prompt", "end") else INK), None


def shown_text(cell: Cell) -> str:
    """Return the text in a cell's box: without spaces around it, line ends and tabs visible."""
    if cell.kind == "end":
        return "∎"
    return "" if cell.kind in ("mask", "inserted") else cell.text.strip(" ").replace("\n", "⏎").replace("\t", "⇥")


def heading(decode: Decode, width: float) -> list[Box]:
    """Return the boxes of the prompt and, below it, of the colour legend."""
    lines = textwrap.wrap(" ".join(decode.prompt.split()), int((width - 2 * MARGIN) / CHAR), max_lines=3)
    boxes = [Box(MARGIN, MARGIN + i * ROW, 0, line, BRIGHT) for i, line in enumerate(lines)]
    low, sure = (BRIGHT, mix(DRAFT_LOW, DRAFT_HIGH, 0.1)), (BRIGHT, DRAFT_HIGH)
    legend: list[tuple[str, Color, Color | None]]
    if decode.verifies:
        legend = [("accepted draft: unsure", *low), ("sure", *sure)]
        legend += [("correction", BRIGHT, EDIT), ("base's word", INK, None)]
    else:
        legend = [("masked", DIM, FAINT), ("drafted: unsure", *low), ("sure", *sure), ("edited", BRIGHT, EDIT)]
        if any(step.inserted or step.deleted for step, _ in decode.passes):
            legend += [("inserted", BRIGHT, INSERT), ("deleted", BRIGHT, DELETE)]
    y, x = MARGIN + len(lines) * ROW, float(MARGIN)
    for name, ink, fill in legend:
        boxes.append(Box(x, y, len(name) * CHAR + 2 * PAD, name, ink, fill))
        x += len(name) * CHAR + 2 * PAD + 8
    return boxes


def stepped(decode: Decode) -> Drawing:
    """Draw one row per pass, grouped by block, with each position in its own column."""
    blocks = [list(group) for _, group in groupby(decode.passes, key=lambda row: row[0].block)]
    width = max(
        640.0,
        len(decode.cost) * CHAR + 2 * MARGIN,
        *(MARGIN + GUTTER + sum(w + 4 for w in _columns(block)) + MARGIN for block in blocks),
    )
    rows = [heading(decode, width)]
    y = rows[0][-1].y + 1.6 * ROW
    for block in blocks:
        widths = _columns(block)
        for step, cells in block:
            label = f"block {step.block:2}" if step.step == 0 else ""
            row = [Box(MARGIN, y, 0, label, DIM)] if label else []
            x = float(MARGIN + GUTTER)
            for cell, column in zip(cells, widths, strict=True):
                *gone, own = with_deleted([cell])
                left = x
                for deleted in gone:
                    row.append(Box(left, y, _width(deleted), shown_text(deleted), *look(deleted)))
                    left += _width(deleted) + 2
                if own.kind != "cut":
                    row.append(Box(left, y, column + x - left, shown_text(own), *look(own)))
                x += column + 4
            rows.append(row)
            y += ROW
        y += ROW / 3
    rows.append([Box(MARGIN, y + ROW / 3, 0, decode.cost, DIM)])
    return Drawing(width, y + 1.4 * ROW + MARGIN, rows)


def _columns(block: list[tuple[Step, list[Cell]]]) -> list[float]:
    """Return the column width of each position: the width of its longest text in any pass."""
    columns = zip(*(cells for _, cells in block), strict=True)
    return [max(sum(_width(part) for part in with_deleted([cell])) for cell in column) for column in columns]


def _width(cell: Cell) -> float:
    return max(len(shown_text(cell)), 2) * CHAR + 2 * PAD


def frames(decode: Decode) -> Iterator[Drawing]:
    """Draw one frame per pass, with masks as wide as their later words, and a last frame without colours.

    A pass that verifies drafts keeps its colours.
    """
    settled = (lambda cell: cell) if decode.verifies else _plain
    width = max(COLUMNS, len(decode.cost)) * CHAR + 2 * MARGIN
    top = heading(decode, width)
    first = top[-1].y + 1.7 * ROW
    texts = {cell.position: cell.text for _, cells in decode.passes for cell in cells}  # the final texts
    pages: list[tuple[list[Box], int, str]] = []
    written: dict[int, Cell] = {}
    for number, (step, cells) in enumerate(decode.passes, start=1):
        # Positions before the pass's first position are final.
        written = {position: settled(cell) for position, cell in written.items() if position < step.start}
        written |= {cell.position: cell for cell in cells if cell.kind not in ("cut", "prompt")}
        masks = ("mask", "inserted")
        shown = [cell._replace(text=texts[cell.position]) if cell.kind in masks else cell for cell in written.values()]
        n_masks = sum(cell.kind in masks for cell in shown)
        pages.append((*_page(shown, first), f"pass {number:3}   {len(shown) - n_masks:3} tokens"))
    pages.append((*_page([settled(cell) for cell in written.values()], first), decode.cost))
    foot = first + max(n_lines for _, n_lines, _ in pages) * ROW + ROW / 2
    for boxes, _, line in pages:
        yield Drawing(width, foot + ROW + MARGIN, [top, boxes, [Box(MARGIN, foot, 0, line, DIM)]])


def _plain(cell: Cell) -> Cell:
    return cell if cell.kind == "end" else cell._replace(kind="settled", dropped="")


def _page(cells: list[Cell], top: float) -> tuple[list[Box], int]:
    """Lay cells out as running text, broken between words; return their boxes and the number of lines."""
    boxes: list[Box] = []
    column = line = 0
    for word in _words(list(with_deleted(cells))):
        text = "".join(cell.text for cell in word)
        if text.startswith("\n"):
            line, column = line + text.count("\n"), 0
        column += text.startswith(" ") and column > 0
        if column > 0 and column + len(text.strip()) > COLUMNS:
            line, column = line + 1, 0
        for index, cell in enumerate(word):
            text = cell.text.strip()
            ink, fill = look(cell)
            if fill is not None or (text and cell.kind != "end"):
                # A box extends into the space around its word but leaves a gap to other boxes of the same word.
                left = 2.5 if index == 0 else -0.75
                right = 2.5 if index == len(word) - 1 else -0.75
                n = max(len(text), 1) * CHAR
                x, y = MARGIN + column * CHAR, top + line * ROW
                shown = "" if cell.kind in ("mask", "inserted") else text
                boxes.append(Box(x - left, y, n + left + right, shown, ink, fill) if fill else Box(x, y, 0, text, ink))
            column += len(text)
    return boxes, line + 1


def _words(cells: list[Cell]) -> Iterator[list[Cell]]:
    word: list[Cell] = []
    for cell in cells:
        if word and cell.text[:1] in (" ", "\n"):
            yield word
            word = []
        word.append(cell)
    if word:
        yield word


# --- Painters


def as_svg(drawing: Drawing) -> str:
    """Return the drawing as SVG, one group per row. `textLength` fixes text widths in any monospaced font."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}" '
        f'width="{drawing.width:.0f}" height="{drawing.height:.0f}" font-size="{SIZE}" '
        'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" xml:space="preserve">',
        f'<rect width="100%" height="100%" rx="10" fill="{_hex(PAPER)}"/>',
    ]
    for row in drawing.rows:
        lines.append("<g>")
        for box in row:
            if box.fill:
                lines.append(
                    f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{ROW - 5}" rx="4" '
                    f'fill="{_hex(box.fill)}"/>'
                )
            if box.text:
                x = box.x + (box.width - len(box.text) * CHAR) / 2 if box.width else box.x
                lines.append(
                    f'<text x="{x:.1f}" y="{box.y + 15.5:.1f}" textLength="{len(box.text) * CHAR:.1f}" '
                    f'fill="{_hex(box.ink)}">{escape(box.text)}</text>'
                )
        lines.append("</g>")
    return "\n".join([*lines, "</svg>\n"])


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def paint(drawing: Drawing) -> Any:
    """Return the drawing as a Pillow image, SHARP image pixels per pixel."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf"), SIZE * SHARP)
    image = Image.new("RGB", (round(drawing.width * SHARP), round(drawing.height * SHARP)), PAPER)
    pen = ImageDraw.Draw(image)
    for box in (box for row in drawing.rows for box in row):
        x, y, width = box.x * SHARP, box.y * SHARP, box.width * SHARP
        if box.fill:
            pen.rounded_rectangle((x, y, x + width, y + (ROW - 5) * SHARP), 4 * SHARP, box.fill)
        if box.text:
            left = x + (width - len(box.text) * CHAR * SHARP) / 2 if width else x
            pen.text((left, y + 15.5 * SHARP), box.text, box.ink, font, anchor="ls")
    return image


def save_animation(images: list[Any], file: Any) -> None:
    """Write an endlessly looping GIF. One palette for all frames lets each frame store only what changed."""
    from PIL import Image

    few = images[:: max(1, len(images) // 6)] + images[-1:]
    sheet = Image.new("RGB", (images[0].width, sum(image.height for image in few)))
    for index, image in enumerate(few):
        sheet.paste(image, (0, index * image.height))
    palette = sheet.quantize(96)
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    times = [PASS_MS] * len(others) + [LAST_MS]
    first.save(file, "GIF", save_all=True, append_images=others, duration=times, loop=0, optimize=True)
