from PIL import Image, ImageFont

from demo.bands import GAP, MARGIN, compose, wrapped_lines


def test_sheet_shows_every_image_where_it_belongs():
    side = 64
    rows = {
        "dense": [Image.new("RGB", (side, side), (i * 20, 0, 0)) for i in range(9)],
        "pruned": [Image.new("RGB", (side, side), (0, i * 20, 0)) for i in range(9)],
    }
    sheet = compose(rows, [f"caption {i}" for i in range(9)])
    band = (sheet.height - GAP) // 3
    for i in range(9):
        x, y = MARGIN + i % 3 * (side + GAP) + side // 2, GAP + i // 3 * band + side // 2
        assert sheet.getpixel((x, y)) == (i * 20, 0, 0)
        assert sheet.getpixel((x, y + side + GAP)) == (0, i * 20, 0)


def test_captions_wrap_inside_their_column():
    font = ImageFont.load_default(15)
    text = "a large checked red square below a large checked blue square on a gray background"
    lines = wrapped_lines(text, font, 256)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 256 for line in lines)
