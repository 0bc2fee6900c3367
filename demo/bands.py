"""Rows of images with their captions, in bands: the plain layout of the demo's pictures."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 3
GAP, MARGIN = 12, 34  # pixels
FONT_SIZE, LINE = 15, 19
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Color = tuple[int, int, int]
INK, PAPER = (30, 30, 30), (255, 255, 255)


def compose(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Bands of `COLUMNS` captions: in each one row of images for every label, then the captions under them."""
    side = next(iter(rows.values()))[0].width
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [wrapped_lines(text, font, side) for text in captions]
    text_height = LINE * max(len(lines) for lines in wrapped)
    band = len(rows) * (side + GAP) + text_height + GAP
    bands = -(-len(captions) // COLUMNS)
    sheet = Image.new("RGB", (MARGIN + COLUMNS * (side + GAP), GAP + bands * band), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, lines in enumerate(wrapped):
        x, y = MARGIN + number % COLUMNS * (side + GAP), GAP + number // COLUMNS * band
        for row, (label, images) in enumerate(rows.items()):
            top = y + row * (side + GAP)
            sheet.paste(images[number], (x, top))
            if number % COLUMNS == 0:
                sheet.paste(upright(label, font, (MARGIN, side)), (0, top))
        for line, text in enumerate(lines):
            draw.text((x, y + len(rows) * (side + GAP) - GAP // 2 + line * LINE), text, INK, font)
    return sheet


def upright(text: str, font: Font, size: tuple[int, int], ink: Color = INK, paper: Color = PAPER) -> Image.Image:
    """A row's label of a size (width, height), turned to be read upwards beside the row."""
    width, height = size
    strip = Image.new("RGB", (height, width), paper)
    ImageDraw.Draw(strip).text((height // 2, width // 2), text, ink, font, anchor="mm")
    return strip.rotate(90, expand=True)


def wrapped_lines(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
