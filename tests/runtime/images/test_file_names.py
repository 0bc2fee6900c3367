import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvar.runtime.images.file_names import MAX_BYTES, MAX_CHARACTERS, free_path, slug


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, above a blue square!", "a-red-circle-above-a-blue-square"),
        ("../../etc/passwd", "etc-passwd"),
        ("..\\..\\boot.ini", "boot-ini"),
        (".hidden", "hidden"),
        ("🙂🙂", "image"),
        ("", "image"),
        ("x" * 100, "x" * 60),
        ("一只猫", "一只猫"),
        ("красный КРУГ", "красный-круг"),
        ("हिन्दी में", "हिन्दी-में"),  # vowel signs belong to their letters
        ("दि\u200dल्ली", "दिल्ली"),  # a joiner does not part a word
        ("Straße", "strasse"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u0301 lone mark", "lone-mark"),
        ("a\u202eb\u2066c", "abc"),  # no mark of writing direction
        ("a\x00b\nc\x7fd", "a-b-c-d"),
        ("\u3164\u115f", "image"),  # letters that nobody sees
        ("❤\ufe0f 1\ufe0f\u20e3", "1"),
        ("\udcff\ud800", "image"),
        ("CON", "image-con"),
        ("nul", "image-nul"),
        ("com¹", "image-com¹"),
        ("LPT9", "image-lpt9"),
        ("lpt9 port", "lpt9-port"),
    ],
)
def test_slug(prompt: str, name: str):
    assert slug(prompt) == name


def test_slug_leaves_room_in_a_file_name():
    for letter in ("x", "é", "猫", "𒀀"):
        found = slug(letter * 300)
        assert set(found) == {letter}
        assert len(found) <= MAX_CHARACTERS
        assert len(found.encode()) <= MAX_BYTES
        assert len(f"{found}-9223372036854775807-1024.webp".encode()) < 255


@given(st.text(max_size=80))
def test_slug_of_any_text_is_a_plain_name(prompt: str):
    found = slug(prompt)
    assert found == unicodedata.normalize("NFC", found)
    assert Path(found).name == found
    assert not found.startswith((".", "-"))
    assert {unicodedata.category(c)[0] for c in found.replace("-", "")} <= set("LNM")
    assert 0 < len(found.encode()) <= MAX_BYTES + len("image-")


def test_free_path_never_names_an_existing_file(tmp_path: Path):
    wanted = tmp_path / "a-7.png"
    assert free_path(wanted) == wanted
    wanted.touch()
    assert free_path(wanted).name == "a-7-2.png"
    (tmp_path / "a-7-2.png").symlink_to("nowhere")
    assert free_path(wanted).name == "a-7-3.png"
