"""The command, also as `python -m fastvar`, where scripts are not on the PATH."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command and exit; see `cli.main`."""
    try:
        from .cli import main as command
    except KeyboardInterrupt:  # it takes a moment to import, and answers for itself from then on
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
