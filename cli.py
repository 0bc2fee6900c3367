"""The `fastvar` command: gathers commands/, and turns errors into exit codes.

Start-up stays light: torch, onnxruntime and numpy are imported by the commands that need them, never here.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from .commands.build import build
from .commands.cache import cache
from .commands.convert import convert
from .commands.doctor import doctor
from .commands.drawing.batch import batch
from .commands.drawing.generate import generate
from .commands.drawing.inpaint import inpaint
from .commands.drawing.serve import serve
from .commands.drawing.upscale import upscale
from .commands.inspect import inspect
from .commands.plan import plan
from .commands.profile import profile
from .commands.sign import sign
from .commands.sizes import sizes
from .commands.tune import tune
from .console.interruption import Interrupted, ended_by_signals
from .console.streams import spared_streams, tell, tell_trouble
from .core.version import __version__
from .errors import FastvarError, OtherCpuWarning, RehearsalWarning, RenamedWarning, UnknownWordsWarning

# Warnings that are meant for the user.
PLAIN = (UnknownWordsWarning, RenamedWarning, RehearsalWarning, OtherCpuWarning)
USER_ERROR = 2  # exit code of everything a user can cause; click uses the same for a wrong option

app = typer.Typer(
    name="fastvar",
    help="Ahead-of-time engines for next-scale visual autoregressive image models with cached token pruning.",
    epilog="Start with: fastvar build CHECKPOINT --out bundle, then: fastvar generate bundle 'a red circle'",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows its plain traceback, ready for a report
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit.

    Exit codes: 0 done, 2 the user's error in plain words, 130 interrupted, 143 terminated, 129 hung up. A bug is a
    traceback.
    """
    _tell_warnings_plainly()
    with spared_streams():
        try:
            with ended_by_signals():
                code = _run(arguments)
        except Interrupted as end:
            tell_trouble(str(end))
            code = end.exit_code
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        app(args=arguments, prog_name="fastvar")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except FastvarError as error:
        tell_trouble(f"error: {error}")
        return USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        raise Interrupted(signal.SIGINT) from None
    return 0


def _tell_warnings_plainly() -> None:
    for category in PLAIN:
        warnings.simplefilter("always", category)
    warnings.showwarning = partial(_show_warning, warnings.showwarning)


def _show_warning(others: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """What the user should know is one line; other warnings keep their place in the code."""
    if issubclass(category, PLAIN):
        typer.echo(f"warning: {message}", err=True)
    else:
        others(message, category, *where)


def _print_version(wanted: bool) -> None:
    if wanted:
        tell(f"fastvar {__version__}")
        raise typer.Exit


@app.callback()
def _fastvar(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


for command in (
    build,
    convert,
    generate,
    upscale,
    inpaint,
    batch,
    serve,
    profile,
    tune,
    inspect,
    sign,
    plan,
    sizes,
    cache,
    doctor,
):
    app.command()(command)


if __name__ == "__main__":
    main()
