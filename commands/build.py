"""`fastvar build`: a checkpoint becomes a bundle of engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from ..console.family_facts import families_with, policy_names
from ..console.options import (
    Batch,
    Offline,
    RequireSignature,
    TrustRemoteCode,
    as_typed,
    batch_sizes,
    check_there,
    given_parameters,
    local_bundle,
    progress_bar,
)
from ..console.streams import tell
from ..core.platform import needs_extra
from ..core.precision import AUTO
from ..engines.registry import DEFAULT
from ..errors import InputError
from ..hub.reference import is_reference

if TYPE_CHECKING:
    from ..export.checkpoints.checkpoint import Checkpoint
    from ..export.checkpoints.hub_models import FoundCheckpoint
    from ..export.construction import BuildReport
    from ..export.options import BuildOptions

TRUST = ("trust_remote_code", "require_signature")  # what they are asked about is a bundle
# Parameters that --from-bundle goes with.
WITH_BUNDLE = ("from_bundle", "out", "policy", "size", "batch", "jobs", "no_cache", "cache", *TRUST)
WITH_WEIGHTS = ("from_bundle", "weights_from", "out", *TRUST)  # parameters that --weights-from goes with


def build(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder; an older bundle there is replaced.")],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint folder, as published or with transformer, image_tokenizer, text_encoder/; the transformer "
            "alone; or hub:ORG/NAME, which is downloaded, at a revision with hub:ORG/NAME@REVISION.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Image size WIDTHxHEIGHT in pixels, or a shape as 16:9; see `fastvar sizes`. "
            "[dim]default: 1024x1024, or the model's only one[/dim]"
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help=f"Token pruning: {policy_names()}, or a TOML policy file.")] = "fastvar",
    backend: Annotated[str, typer.Option(help="Backend that compiles the engines; see `fastvar doctor`.")] = (DEFAULT),
    target: Annotated[
        str | None,
        typer.Option(
            help="Devices the engines are for: cpu; or GPUs as sm86,sm89,sm120; or current; or cuda for aotinductor. "
            "[dim]default: cpu, or the GPU in this machine[/dim]"
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="auto, fp32, bf16 or fp16. auto is bf16 on GPUs and fp32 with onnxruntime; with aotinductor on a CPU "
            "the one whose products were measured to be clearly the fastest here (see `fastvar doctor`)."
        ),
    ] = AUTO,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Store the layers' matrices in 8 bits: int8, or fp8 from sm89 on; w8a8 multiplies them with int8 "
            "activations, for aotinductor on CPUs in bf16. [dim]default: as --precision[/dim]"
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="Attention kernel of aotinductor on GPUs: flash or cudnn. [dim]default: flash[/dim]"),
    ] = None,
    allow_unfused: Annotated[
        bool, typer.Option("--allow-unfused", help="Accept GPU engines whose attention is not one kernel.")
    ] = False,
    via: Annotated[
        str | None,
        typer.Option(
            help="torch-tensorrt: to TensorRT engines without ONNX, on a GPU machine that has it. "
            "[dim]default: what the backend reads[/dim]"
        ),
    ] = None,
    guidance: Annotated[
        str, typer.Option(help="Engines with classifier-free guidance (on), without (off), or both.")
    ] = "both",
    batch: Batch = "1",
    text_length: Annotated[
        int | None,
        typer.Option(help="Longest prompt in tokens; shorter is faster. [dim]default: the model's[/dim]", min=1),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which of several models in the checkpoint folder, by name or file."),
    ] = None,
    image_tokenizer: Annotated[
        Path | None,
        typer.Option(help="Image tokenizer file, where it is not in the checkpoint folder; or hub:ORG/NAME/FILE."),
    ] = None,
    text_encoder: Annotated[
        Path | None,
        typer.Option(help="Text encoder folder, where it is not in the checkpoint folder; or hub:ORG/NAME."),
    ] = None,
    offline: Offline = False,
    random_weights: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Random weights of a model that `fastvar sizes --help` names, instead of CHECKPOINT."
        ),
    ] = None,
    with_text_encoder: Annotated[
        bool, typer.Option("--with-text-encoder", help="With --random-weights: a random text encoder too.")
    ] = False,
    with_encoder: Annotated[
        bool, typer.Option("--with-encoder", help="Include the image encoder, which images are edited through.")
    ] = False,
    decoder_tile: Annotated[
        int | None,
        typer.Option(
            metavar="ROWS",
            min=1,
            help="Decode the image in stripes of so many latent rows: less memory, the same image. "
            "[dim]default: whole[/dim]",
        ),
    ] = None,
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth", help=f"Mixtures of codes (more_smooth) in place of single ones ({families_with('smooth')})."
        ),
    ] = False,
    final_iterations: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=f"Draw the last scale in N rounds; goes with --policy dense ({families_with('final_iterations')}).",
        ),
    ] = 1,
    no_residual: Annotated[
        bool,
        typer.Option(
            "--no-residual", help=f"Leave out the diffusion head, final_stage 1 ({families_with('residual')})."
        ),
    ] = False,
    from_bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            help="Another policy, size or batch for this bundle, instead of CHECKPOINT: takes over its weights, and "
            "makes only engines. Everything but --policy, --size and --batch is as in BUNDLE, and --policy too where "
            "--batch alone is given.",
        ),
    ] = None,
    weights_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --from-bundle: another transformer of the same sizes, a fine-tune say, in its engines.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Processes that trace graphs. [dim]default: one per core[/dim]", min=1),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor fill the engine cache.")] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Engine cache folder. [dim]default: see `fastvar doctor`[/dim]")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    require_signature: RequireSignature = None,
) -> None:
    """Turn a checkpoint into a bundle of engines. No GPU is needed."""
    from ..core.plan import SamplingMode
    from ..engines.cache.engine_cache import default_folder
    from ..engines.registry import get_backend
    from ..export.options import BuildOptions

    found = False if no_cache else cache or True
    if from_bundle is not None:
        given = given_parameters(context)
        trust = (trust_remote_code, require_signature)
        if weights_from is not None:
            _replace_weights(from_bundle, out, weights_from, given, trust)
            return
        images = batch_sizes(batch) if "batch" in given else None
        _rebuild(from_bundle, out, policy, size if "size" in given else None, images, found, jobs, given, trust)
        return
    if weights_from is not None:
        raise InputError("--weights-from goes with --from-bundle", fix="give the bundle that has the engines")
    if trust_remote_code or require_signature:
        raise InputError("--trust-remote-code and --require-signature go with --from-bundle", fix="leave them away")
    # What is wrong with the options is told before torch takes its seconds to import.
    options = BuildOptions(
        size=size,
        policy=policy,
        backend=backend,
        target=target,
        precision=precision,
        weights=weights,
        attention=attention,
        allow_unfused=allow_unfused,
        via=via,
        guidance=guidance,
        batch=batch_sizes(batch),
        text_length=text_length,
        with_encoder=with_encoder,
        decoder_tile=decoder_tile,
        sampling_mode=SamplingMode(smooth, final_iterations, not no_residual),
        model=model,
        image_tokenizer=image_tokenizer,
        text_encoder=text_encoder,
    )
    _check_size(size, random_weights)
    compiler = get_backend(backend, target=target)
    numbers, _ = compiler.precision(precision, weights, None if no_cache else cache or default_folder())
    compiler.resolve_target(target, numbers)
    with needs_extra("export"):
        from ..export.build import build as build_bundle

        source = _source(checkpoint, random_weights, with_text_encoder, options, offline)
        with progress_bar() as progress:
            told = _on_graph(progress, "reading the checkpoint")
            report = build_bundle(source, out=out, options=options, cache=found, jobs=jobs, progress=told)
    _tell(report)


def _rebuild(
    bundle: Path,
    out: Path,
    policy: str,
    size: str | None,
    batch: tuple[int, ...] | None,
    cache: Path | bool,
    jobs: int | None,
    given: Sequence[str],
    trust: tuple[bool, Path | None],
) -> None:
    """Another policy, size or batch for a bundle."""
    _refuse_others(
        "--from-bundle",
        given,
        WITH_BUNDLE,
        "--policy, --size, --batch, --out and how to build alone: all else is as in the bundle",
        "leave it away, or build from the checkpoint",
    )
    from ..engines.bundle.bundle import Bundle
    from ..export.options import check_batch
    from ..families import family_named

    check_batch(batch or (1,))
    # What is wrong with the options is told before torch takes its seconds to import.
    source = Bundle.open(local_bundle(bundle), "all", trust_remote_code=trust[0], require_signature=trust[1])
    old = source.manifest
    family, transformer, plan = family_named(old.family), old.transformer, old.plan
    schedule = plan.schedule if size is None else family.schedule_for(family.size(size, transformer), transformer)
    same = batch is not None and size is None and "policy" not in given
    chosen = plan.policy if same else family.policy(policy, schedule, plan.depth)
    family.plan(schedule, chosen, transformer, plan.sampling_mode)
    with needs_extra("export"), progress_bar() as progress:
        from ..export.rebuild import rebuild

        told = _on_graph(progress, "starting")
        report = rebuild(source, out, policy=chosen, size=size, batch=batch, cache=cache, jobs=jobs, progress=told)
    _tell(report)


def _replace_weights(
    bundle: Path, out: Path, transformer: Path, given: Sequence[str], trust: tuple[bool, Path | None]
) -> None:
    """Another transformer for a bundle."""
    _refuse_others(
        "--weights-from",
        given,
        WITH_WEIGHTS,
        "--from-bundle and --out alone: all else is as in the bundle",
        "leave it away; give the new bundle another policy or size in a second step",
    )
    if is_reference(transformer):
        raise InputError(
            f"--weights-from {transformer} is on a hub",
            expected="a transformer on this disk",
            fix=f"fastvar convert {transformer} --out FILE.safetensors brings it here",
        )
    check_there(transformer, "a transformer")
    from ..engines.bundle.bundle import Bundle

    source = Bundle.open(local_bundle(bundle), "all", trust_remote_code=trust[0], require_signature=trust[1])
    with needs_extra("export"):
        from ..export.new_weights import replace_weights

        report = replace_weights(source, out, transformer=transformer)
    _tell(report)


def _refuse_others(option: str, given: Sequence[str], allowed: tuple[str, ...], expected: str, fix: str) -> None:
    """What an option does not go with."""
    refused = [as_typed(name) for name in given if name not in allowed]
    if refused:
        raise InputError(f"{option} does not go with {', '.join(refused)}", expected=expected, fix=fix)


def _check_size(size: str | None, random_weights: str | None) -> None:
    """A size that no model draws; which ones a checkpoint draws is known when it has been read."""
    from ..core.schedule import parse_size
    from ..families import FAMILIES, family_of, named_transformer

    if size is not None:
        parse_size(size, [shape for family in FAMILIES.values() for shape in family.shapes()])
    if random_weights is not None:
        model = named_transformer(random_weights)
        family = family_of(model)
        family.schedule_for(family.size(size, model), model)


def _tell(report: BuildReport) -> None:
    from ..console.tables import build_lines

    for line in build_lines(report):
        tell(line)


def _source(
    checkpoint: Path | None, random_weights: str | None, with_text_encoder: bool, options: BuildOptions, offline: bool
) -> FoundCheckpoint | Checkpoint:
    if (checkpoint is None) == (random_weights is None):
        raise InputError(
            "nothing to build from" if checkpoint is None else "CHECKPOINT and --random-weights exclude each other",
            expected="a CHECKPOINT, --random-weights MODEL, or --from-bundle BUNDLE",
        )
    if random_weights is not None:
        if options.model is not None:
            raise InputError("--model goes with a CHECKPOINT", fix="name the model with --random-weights alone")
        from ..export.checkpoints.random_weights import random_checkpoint

        return random_checkpoint(random_weights, text_encoder=with_text_encoder)
    assert checkpoint is not None
    if with_text_encoder:
        raise InputError(
            "--with-text-encoder goes with --random-weights", fix="drop it: a checkpoint brings its text encoder"
        )
    from ..export.checkpoints.hub_models import find_checkpoint
    from ..hub.repository import HubAccess

    check_there(checkpoint, "a folder, a transformer file, or hub:ORG/NAME")
    parts = {"image_tokenizer": options.image_tokenizer, "text_encoder": options.text_encoder}
    return find_checkpoint(checkpoint, model=options.model, **parts, access=HubAccess(offline=offline), told=tell)


def _on_graph(progress: Progress, first: str) -> Callable[[str, int, int], None]:
    task = progress.add_task(first, total=None)

    def report(what: str, done: int, total: int) -> None:
        progress.update(task, description=what, completed=done, total=total)

    return report
