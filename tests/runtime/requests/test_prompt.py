import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fastvar.errors import BundleError, InputError
from fastvar.families.base import PromptFormat
from fastvar.runtime.requests.prompt import MAX_PROMPT_BYTES, PromptTokenizer
from tests.conftest import TOKENIZER

LENGTH = 6
END, UNKNOWN = 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(TOKENIZER, LENGTH)


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, int]:
    return json.loads(TOKENIZER.read_text())["model"]["vocab"]


def test_ids_then_padding_and_a_mask_that_tells_them_apart(tokenizer: PromptTokenizer, vocabulary: dict[str, int]):
    found = tokenizer.encode("a red circle")
    words = [vocabulary[word] for word in ("a", "red", "circle")]
    assert found.length == 4
    assert found.ids.tolist() == [[*words, END, 0, 0]]
    assert found.mask.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert found.ids.dtype == found.mask.dtype == np.int64


def test_longest_prompt_that_fits(tokenizer: PromptTokenizer):
    found = tokenizer.encode("a red circle on white")
    assert found.length == LENGTH
    assert found.mask.all()
    assert found.ids[0, -1] == END


def test_one_token_too_many_is_refused_not_cut(tokenizer: PromptTokenizer):
    with pytest.raises(InputError) as error:
        tokenizer.encode("a red circle on white background")
    assert error.value.problem == "the prompt has 7 tokens"
    assert error.value.expected.startswith("at most 6")
    assert "--text-length" in error.value.fix


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path: Path):
    """Tokenizers of T5 are often saved with truncation to 512 on."""
    data = json.loads(TOKENIZER.read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 5},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    encoded = PromptTokenizer(path, LENGTH).encode("a red circle")
    assert encoded.ids.tolist() == PromptTokenizer(TOKENIZER, LENGTH).encode("a red circle").ids.tolist()
    assert encoded.length == 4


def test_prefix_and_padding_as_the_format_says(vocabulary: dict[str, int]):
    """A prefix is tokenized apart, without the end token that prompts get."""
    blue, *words = (vocabulary[word] for word in ("blue", "a", "red", "circle"))
    rows = {}
    for left in (False, True):
        found = PromptTokenizer(TOKENIZER, LENGTH, PromptFormat("blue", UNKNOWN, left)).encode("a red circle")
        assert found.length == 4
        rows[left] = found.ids[0].tolist(), found.mask[0].tolist()
    assert rows[False] == ([blue, *words, END, UNKNOWN, UNKNOWN], [1, 1, 1, 1, 1, 0, 0])
    assert rows[True] == ([blue, UNKNOWN, UNKNOWN, *words, END], [1, 0, 0, 1, 1, 1, 1])


def test_a_prefix_takes_no_room(vocabulary: dict[str, int]):
    found = PromptTokenizer(TOKENIZER, LENGTH, PromptFormat("blue blue blue")).encode("a red circle on white")
    assert found.ids.shape == (1, 3 + LENGTH)
    assert found.length == LENGTH


def test_emoji_and_other_scripts_are_tokens_like_any(tokenizer: PromptTokenizer):
    assert tokenizer.encode("🙂 日本").ids[0, :3].tolist() == [UNKNOWN, UNKNOWN, END]


def test_unknown_pieces_are_told_as_they_were_written(tokenizer: PromptTokenizer):
    found = tokenizer.encode("a  Zorped circle, Zorped")
    assert (found.unknown, found.is_known) == (("Zorped",), True)
    found = tokenizer.encode("\u4e00\u4e2a 🙂")
    assert (found.unknown, found.is_known) == (("\u4e00\u4e2a", "🙂"), False)
    assert tokenizer.encode("a red circle").unknown == ()


def saved(tmp_path: Path, model: Any, splitter: Any) -> PromptTokenizer:
    made = Tokenizer(model)
    made.pre_tokenizer = splitter
    made.save(str(tmp_path / "tokenizer.json"))
    return PromptTokenizer(tmp_path / "tokenizer.json", 32)


def test_unknown_pieces_of_a_vocabulary_as_t5_has_it(tmp_path: Path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581red", -4.0)]
    made = saved(tmp_path, models.Unigram(pieces, unk_id=2), pre_tokenizers.Metaspace())
    for prompt, unknown, is_known in (
        ("red \u4e00\u4e2a", ("\u4e00\u4e2a",), True),
        ("\u4e00\u4e2a red", ("\u4e00\u4e2a",), True),
        ("\u4e00 \u4e2a", ("\u4e00", "\u4e2a"), False),
    ):
        found = made.encode(prompt)
        assert (found.unknown, found.is_known) == (unknown, is_known)


def test_a_vocabulary_of_bytes_knows_everything(tmp_path: Path):
    """As Qwen2's."""
    vocabulary = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    made = saved(tmp_path, models.BPE(vocabulary, []), pre_tokenizers.ByteLevel())
    assert (made.encode("red \u4e00\u4e2a").unknown, made.encode("\u4e00\u4e2a").is_known) == ((), True)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", "\u3000"])
def test_nothing_to_draw(tokenizer: PromptTokenizer, prompt: str):
    with pytest.raises(InputError, match="the prompt is empty"):
        tokenizer.encode(prompt)


@pytest.mark.parametrize("prompt", [None, 7, b"a red circle", ["a red circle"]])
def test_not_a_text(tokenizer: PromptTokenizer, prompt: object):
    with pytest.raises(InputError, match=f"the prompt is a {type(prompt).__name__}"):
        tokenizer.encode(prompt)


@pytest.mark.parametrize("prompt", ["x" * 100_000, "🙂" * 25_000])
def test_100_kb(tokenizer: PromptTokenizer, prompt: str):
    with pytest.raises(InputError) as error:
        tokenizer.encode(prompt)
    assert error.value.problem == "the prompt has 100000 bytes"
    assert str(MAX_PROMPT_BYTES) in error.value.expected


def test_lone_surrogate(tokenizer: PromptTokenizer):
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("a red \ud83d circle")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe"])
def test_unreadable_tokenizer_file(tmp_path: Path, content: bytes | None):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot read .*tokenizer\.json") as error:
        PromptTokenizer(path, LENGTH)
    assert "rebuild" in error.value.fix
