"""`fastvar serve`: an images server for bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...console import sampling
from ...console.options import RequireSignature, TrustRemoteCode, local_bundle
from ...console.streams import tell, tell_trouble
from ...core.platform import needs_extra
from ...errors import InputError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE...",
            help="Folders made by `fastvar build`, or hub:ORG/NAME; each is served under its folder's name, or as NAME "
            "by NAME=BUNDLE.",
            show_default=False,
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    queue: Annotated[int, typer.Option(min=1, help="Requests of a bundle that may wait; others get 429.")] = 16,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys that clients must send, one a line. [dim]none[/dim]")
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ALIAS=NAME", help="A further name of a bundle: gpt-image-1=NAME, say.", show_default=False
        ),
    ] = None,
    max_body: Annotated[str, typer.Option(metavar="BYTES", help="Largest request with images.")] = "50MiB",
    drain: Annotated[float, typer.Option(help="Seconds to finish what is drawn, when asked to end.")] = 30.0,
    batch_wait_ms: Annotated[
        float, typer.Option(help="How long a request waits for others to share its pass, where a bundle has --batch.")
    ] = 5.0,
    instances: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pipelines of a bundle that draw side by side when several passes wait, each on its share of the "
            "cores. [dim]2 on a CPU where engines and memory allow[/dim]",
            show_default=False,
        ),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    threads: sampling.Threads = None,
    offload_text_encoder: sampling.OffloadTextEncoder = False,
    no_cuda_graphs: sampling.NoCudaGraphs = False,
    memory: sampling.Memory = None,
    batch: sampling.MaxBatch = None,
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = None,
) -> None:
    """Serve bundles over HTTP, as OpenAI's images API; with a page that shows an image grow.

    Requests wait in order of arrival, and share passes where the bundle has engines for several images. A client that
    is gone is drawn for no further. SIGTERM finishes what has begun.
    """
    with needs_extra("serve"):
        from ...serving import server
        from ...serving.options import ServeOptions, read_aliases, read_api_keys
    options = ServeOptions(
        queue=queue,
        api_keys=() if api_key_file is None else read_api_keys(api_key_file),
        aliases=read_aliases(alias or []),
        max_body=max_body,
        drain=drain,
        batch_wait_ms=batch_wait_ms,
        instances=instances,
        log_prompts=log_prompts,
    )
    if host not in LOOPBACK and api_key_file is None:
        tell_trouble(f"warning: {host} is open to the network, and anybody may draw: --api-key-file says who may")
    trust = (trust_remote_code, require_signature)
    load_options = sampling.load_options(threads, offload_text_encoder, no_cuda_graphs, memory, *trust, batch)
    server.serve(_named(bundles), options, host=host, port=port, told=tell, **load_options)


def _named(bundles: list[str]) -> dict[str, Path]:
    """Folders by name.

    Raises:
        InputError: two of one name, or a name that no address can hold.
        HubError, BundleError: one cannot be downloaded.
    """
    from ...serving.options import NAME

    found: dict[str, Path] = {}
    for text in bundles:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = Path(text.removeprefix("hub:")).resolve().name, text
        if not NAME.fullmatch(name):
            fix = "name it: NAME=BUNDLE"
            raise InputError(f"a bundle named {name!r}", expected="letters, digits, '.', '_' and '-'", fix=fix)
        if name in found:
            raise InputError(f"two bundles are named {name}", expected="names that differ", fix="name one: NAME=BUNDLE")
        found[name] = local_bundle(Path(folder))
    return found
