"""Files of prompts: text and JSON Lines, what each line may say, errors that name it, and images that can be traced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.console.prompt_file import PromptLine, params_of, plain_prompts, read_prompt_file, subject_of
from fastvar.errors import InputError
from fastvar.runtime.images.formats import read_metadata
from fastvar.runtime.requests.params import SamplingParams


@pytest.fixture
def write(tmp_path: Path):
    def call(text: str | bytes, name: str = "prompts.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return call


def subjects(path: Path) -> list[tuple[int, str | int]]:
    return [(line.number, line.subject) for line in read_prompt_file(path)]


# Reading


def test_a_text_file_is_a_prompt_a_line(write):
    path = write("# scenes\r\n\n  a red circle \r\na blue square # above\n   \n#a green one\n猫\u2028 on a mat")
    assert subjects(path) == [(3, "a red circle"), (4, "a blue square # above"), (7, "猫\u2028 on a mat")]


def test_a_byte_order_mark_is_no_part_of_the_prompt(write):
    assert subjects(write(b"\xef\xbb\xbfa red circle")) == [(1, "a red circle")]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.NDJSON", "prompts.txt"])
def test_json_lines_bring_settings(write, name):
    rows = [{"prompt": "# a red circle", "seed": 7, "temperature": 0.5}, {"class_label": 207, "top_k": None}]
    first, second = read_prompt_file(write("\n".join(map(json.dumps, rows)) + "\n\n", name))
    assert (first.number, first.subject, first.kind) == (1, "# a red circle", "prompt")
    assert first.settings == {"seed": 7, "temperature": 0.5}
    assert (second.number, second.subject, second.kind, second.settings) == (2, 207, "class_label", {})


def test_what_a_line_does_not_say_the_command_line_does(write):
    path = write('{"prompt": "a", "seed": 9, "tau": 0.25}\n{"prompt": "b", "num_images": 3}')
    first, second = params_of(read_prompt_file(path), SamplingParams(seed=1, tau=0.5, top_p=0.9))
    assert first == SamplingParams(seed=9, tau=0.25, top_p=0.9)
    assert second == SamplingParams(seed=1, tau=0.5, top_p=0.9, num_images=3)


WRONG = {
    '{"prompt": "a"}\n{"prompt": "b"': "line 2: not JSON",
    '{"prompt": "a"}\n\nplain': "line 3: not JSON",
    '{"prompt": "a"}\n["b"]': "line 2: a list\nexpected: an object",
    '{"prompt": "a", "sed": 7}': "line 1: unknown field 'sed'\nexpected: some of prompt, class_label, guidance_scale",
    '{"prompt": "a", "seed": 7, "seed": 8}': "line 1: seed given twice",
    '{"seed": 7}': "line 1: neither prompt nor class_label",
    '{"prompt": "a", "class_label": 7}': "line 1: both prompt and class_label",
    '{"prompt": 7}': "line 1: prompt is a number\nexpected: text",
    '{"prompt": null}': "line 1: prompt is null",
    '{"class_label": true}': "line 1: class_label is true",
    '{"prompt": "a", "negative_prompt": ["b"]}': "line 1: negative_prompt is a list",
    '{"prompt": "a"}\n{"prompt": "b", "tau": NaN}': "line 2: not JSON: NaN is no number",
    '{"prompt": {"a": 1}}': "line 1: prompt is an object",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_line_that_is_not_understood_is_named(write, text):
    path = write(text)
    with pytest.raises(InputError) as caught:
        read_prompt_file(path)
    assert str(caught.value).startswith(f"{path}, {WRONG[text]}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('"seed": "7"', "line 2: seed"),
        ('"seed": -1', "line 2: seed -1"),
        ('"guidance_scale": 101', "line 2: guidance_scale 101 is out of range"),
        ('"top_p": "0.9"', "line 2: top_p '0.9' is text"),
        ('"num_images": 0', "line 2: num_images 0 is out of range"),
        ('"tau": 1, "temperature": 1', "line 2: temperature and tau are the same parameter"),
    ],
)
def test_a_value_out_of_range_names_its_line(write, settings, words):
    lines = read_prompt_file(write('{"prompt": "a"}\n{"prompt": "b", ' + settings + "}"))
    with pytest.raises(InputError, match=words):
        params_of(lines, SamplingParams())


@pytest.mark.parametrize(
    ("data", "words"), [(b"\xff", "not UTF-8"), (b"# a\n\n", "holds no prompt"), (b"", "holds no")]
)
def test_what_holds_no_prompts(write, data, words):
    with pytest.raises(InputError, match=words):
        read_prompt_file(write(data))


def test_a_class_where_prompts_are_drawn():
    line = PromptLine("f", 3, 207, "class_label")
    assert subject_of(line, labels=True) == {"class_labels": 207}
    with pytest.raises(InputError, match=r'a class label given\nexpected: "prompt"'):
        subject_of(line, labels=False)
    assert subject_of(PromptLine("f", 3, "207", None), labels=True) == {"class_labels": "207"}


def test_who_draws_all_alike_takes_prompts_alone(write):
    assert plain_prompts(write('{"prompt": "a"}\n{"prompt": "b"}')) == ("a", "b")
    with pytest.raises(InputError, match="line 1: settings of its own: seed"):
        plain_prompts(write('{"prompt": "a", "seed": 7}'))
    with pytest.raises(InputError, match="line 1: the class label 7\n"):
        plain_prompts(write('{"class_label": 7}'))


# Drawing


def test_each_line_is_drawn_its_own_way_under_a_name_that_leads_to_it(run, tiny_bundle, tmp_path, write):
    rows = (
        {"prompt": "a red circle", "seed": 3, "num_images": 2},
        {"prompt": "a red circle", "seed": 3},
        {"prompt": "a blue square", "temperature": 0.5},
    )
    first, *others = map(json.dumps, rows)
    path = write("\n".join((first, "", *others)))
    code, out, err = run("generate", tiny_bundle, "--prompts", path, "--seed", 5, "--cfg", 1, "--out", "new")
    assert (code, err) == (0, "")
    assert sorted(os.listdir(tmp_path / "new")) == [
        "0001-a-red-circle-3.png",
        "0001-a-red-circle-4.png",
        "0003-a-red-circle-3.png",
        "0004-a-blue-square-5.png",
    ]
    pictures = [tmp_path / "new" / f"000{number}-a-red-circle-3.png" for number in (1, 3)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    told = read_metadata(tmp_path / "new/0004-a-blue-square-5.png")
    assert json.loads(told["settings"])["tau"] == 0.5
    assert out.count("wrote ") == 4


def test_a_line_is_drawn_as_by_itself(run, tiny_bundle, tmp_path, write):
    assert run("generate", tiny_bundle, "a red circle", "--seed", 3, "--cfg", 1, "--out", "alone.png")[0] == 0
    path = write("a red circle\n")
    assert run("generate", tiny_bundle, "--prompts", path, "--seed", 3, "--cfg", 1, "--out", "file.png")[0] == 0
    assert (tmp_path / "file.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_prompts_come_through_stdin(tiny_bundle, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastvar",
        "generate",
        str(tiny_bundle),
        "--prompts",
        "-",
        "--seed",
        "1",
        "--cfg",
        "1",
    ]
    done = subprocess.run(command, cwd=tmp_path, input=b"red\n# no\nblue\n", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(os.listdir(tmp_path)) == ["0001-red-1.png", "0003-blue-1.png"]
    done = subprocess.run(command, cwd=tmp_path, input=b"{]", capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: stdin, line 1: not JSON")


REFUSED = {
    '{"prompt": "a red circle"}\n{"prompt": "b", "top_k": 5}': "line 2: infinity models have no top_k",
    '{"prompt": "a red circle"}\n{"class_label": 7}': "line 2: a class label given",
    "a red circle\n" + "red " * 40: "line 2: the prompt has",
    '{"prompt": "a"}\n{"prompt": "b", "guidance_scale": 1, "negative_prompt": "c"}': "line 2: negative_prompt has no",
    '{"prompt": "a"}\n{"prompt": " "}': "line 2: the prompt is empty",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_bundle_cannot_draw_is_told_before_anything_is_drawn(run, tiny_bundle, tmp_path, write, text):
    path = write(text)
    code, _, err = run("generate", tiny_bundle, "--prompts", path, "--out", "new")
    assert code == 2
    assert err.startswith(f"error: {path}, {REFUSED[text]}")
    assert not (tmp_path / "new").exists()


def test_what_was_written_stays_when_a_later_image_cannot_be_saved(run, tiny_bundle, tmp_path, write, monkeypatch):
    from fastvar.runtime.images import files

    saved = files.write_new

    def fail_at_the_third(path: Path, data: bytes) -> Path:
        if "0003" in path.name:
            raise OSError(28, "No space left on device")
        return saved(path, data)

    monkeypatch.setattr(files, "write_new", fail_at_the_third)
    path = write("a\nb\nc\nd\n")
    code, _, err = run("generate", tiny_bundle, "--prompts", path, "--seed", 1, "--cfg", 1, "--out", "new")
    assert code == 2
    assert "0003-c-1.png: No space left on device" in err
    assert sorted(os.listdir(tmp_path / "new")) == ["0001-a-1.png", "0002-b-1.png"]


def test_prompts_come_one_way(run, tiny_bundle, write):
    code, _, err = run("generate", tiny_bundle, "a", "--prompts", write("a"))
    assert (code, err.splitlines()[0]) == (2, "error: PROMPT and --prompts exclude each other")
    code, _, err = run("generate", tiny_bundle)
    assert (code, err.splitlines()[0]) == (2, "error: nothing to draw")
    code, _, err = run("generate", tiny_bundle, "--prompts", write("a\nb"), "--out", "one.png")
    assert (code, err.splitlines()[0]) == (2, "error: --out names one file for 2 images")
