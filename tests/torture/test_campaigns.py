"""The campaigns in short form, each with a few trials; in a process of their own, since they fork."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="campaigns fork")]


def test_nothing_is_lost_broken_or_crashed(tmp_path: Path):
    out = tmp_path / "torture.json"
    command = [sys.executable, "-m", "tests.torture", "--share", "0.02", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert (done.returncode, record["bad"]) == (0, 0), json.dumps(record["campaigns"], indent=1)
    kills = [found for name, found in record["campaigns"].items() if name.startswith("kill")]
    assert [found["trials"] for found in kills] == [2, 2, 2]
    damaged = sum(found["trials"] for name, found in record["campaigns"].items() if name.startswith("damaged"))
    assert damaged == 200
