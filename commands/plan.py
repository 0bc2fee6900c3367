"""`fastvar plan`: what a generation will hold in memory, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console.family_facts import policy_names
from ..console.options import (
    AsJson,
    Batch,
    Offline,
    as_typed,
    batch_sizes,
    check_there,
    given_parameters,
    print_json,
    print_tables,
)
from ..console.streams import check_printed, tell
from ..core.platform import needs_extra
from ..core.precision import AUTO
from ..engines.registry import DEFAULT_OF_PLANS
from ..errors import DeviceMemoryError, InputError

if TYPE_CHECKING:
    from ..profiling.estimates.fitting import Fit
    from ..profiling.estimates.memory_plan import MemoryPlan
    from ..profiling.estimates.requests import PlanRequest

BUILD_OPTIONS = (
    "model",
    "offline",
    "size",
    "policy",
    "backend",
    "target",
    "precision",
    "weights",
    "guidance",
    "text_length",
    "batch",
    "decoder_tile",
)


def plan(
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Argument(
            help="A bundle, or a checkpoint as `fastvar build` takes it: a folder, or hub:ORG/NAME, which is "
            "downloaded.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model that `fastvar sizes --help` names, with its text encoder, instead of a folder; or which of "
            "several in the folder or on the hub."
        ),
    ] = None,
    offline: Offline = False,
    size: Annotated[
        str | None,
        typer.Option(help="Image size; see `fastvar sizes`. [dim]default: 1024x1024, or the model's only one[/dim]"),
    ] = None,
    policy: Annotated[str, typer.Option(help=f"Token pruning: {policy_names()}, or a TOML policy file.")] = "fastvar",
    backend: Annotated[str, typer.Option(help="Backend to plan for; its library need not be installed.")] = (
        DEFAULT_OF_PLANS
    ),
    target: Annotated[
        str | None,
        typer.Option(help="Devices to plan for, where a backend has several kinds: cuda-sm90 for aotinductor, say."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="auto, fp32, bf16 or fp16. auto is bf16 on GPUs and fp32 with onnxruntime; with aotinductor on a CPU "
            "what `fastvar doctor` says, where that has been run here, else bf16."
        ),
    ] = AUTO,
    weights: Annotated[
        str | None, typer.Option(help="Store the layers' matrices in 8 bits: int8, fp8 or w8a8.")
    ] = None,
    guidance: Annotated[str, typer.Option(help="Engines with guidance (on), without (off), or both.")] = "both",
    text_length: Annotated[
        int | None, typer.Option(help="Longest prompt in tokens. [dim]default: the model's[/dim]", min=2)
    ] = None,
    batch: Batch = "1",
    decoder_tile: Annotated[
        int | None, typer.Option(metavar="ROWS", min=1, help="Image decoder in stripes of so many latent rows.")
    ] = None,
    offload_text_encoder: Annotated[
        bool,
        typer.Option(
            "--offload-text-encoder", help="The text encoder's weights are copied to the GPU for every prompt."
        ),
    ] = False,
    memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="A budget, 15GiB say: choose what fits, or say what would.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a generation will hold in memory, moment by moment, before anything is built.

    With --memory: exit code 0 where it fits, if need be with other choices, tried in this order: the image decoder in
    stripes, the text encoder off the device, 8-bit weights. Exit code 2 where it does not, and what would.
    """
    from ..core.dtypes import parse_bytes
    from ..engines.bundle.bundle import is_bundle
    from ..export.options import BuildOptions
    from ..profiling.estimates.fitting import Fit, MemoryOptions, first_fit
    from ..profiling.estimates.requests import bundle_request

    budget = parse_bytes(memory) if memory is not None else None
    choice = MemoryOptions(decoder_tile, offload_text_encoder, weights)
    if source is not None and is_bundle(source):
        _check_bundle_options(context)
        request = bundle_request(source, choice)
    else:
        with needs_extra("export"):
            from ..profiling.estimates.build_requests import build_request, find_checkpoint

            options = BuildOptions(
                size,
                policy,
                backend,
                target,
                precision,
                guidance=guidance,
                batch=batch_sizes(batch),
                text_length=text_length,
            )
            if source is not None:
                check_there(source, "a bundle, a checkpoint folder, or hub:ORG/NAME")
            told = (lambda _: None) if as_json else tell
            request = build_request(find_checkpoint(source, model, offline=offline, told=told), options, choice)
    fit = None if budget is None else first_fit(request.plan_of, request.asked, request.limits, budget)
    shown = fit or Fit(choice, request.plan_of(choice))
    _show(request, shown, budget, as_json)
    if budget is not None and fit is None:
        raise _refusal(request, shown.plan, budget)


def _check_bundle_options(context: typer.Context) -> None:
    """A bundle's own are fixed: to ignore an option would be a lie."""
    refused = [as_typed(name) for name in given_parameters(context) if name in BUILD_OPTIONS]
    if refused:
        raise InputError(
            f"{refused[0]} cannot change a bundle that is built", fix="plan its checkpoint, or --model MODEL"
        )


def _show(request: PlanRequest, shown: Fit, budget: int | None, as_json: bool) -> None:
    from ..console.plan_tables import plan_facts, timeline_table, verdict_lines

    if as_json:
        print_json(plan_facts(request, shown, budget))
        return
    print_tables(timeline_table(request.title, shown.plan, budget))
    for line in verdict_lines(request, shown, budget):
        tell(line)
    check_printed()


def _refusal(request: PlanRequest, plan: MemoryPlan, budget: int) -> DeviceMemoryError:
    from ..console.plan_tables import largest_part
    from ..core.dtypes import human_bytes
    from ..profiling.estimates.fitting import choices, smallest_change

    *_, most_saving = choices(request.asked, request.limits)
    least = request.plan_of(most_saving).need.total_bytes
    found = smallest_change(request.changes(), request.asked, budget)
    if found is None:
        fix = "choose a smaller model or a larger budget"
    else:
        change, fit = found
        options = [change.what, *fit.choice.build_options(), *fit.choice.load_options()]
        fix = f"the smallest change that fits: {' '.join(options)}, {human_bytes(fit.plan.need.total_bytes)}"
    return DeviceMemoryError(
        f"{request.title} does not fit into {human_bytes(budget)}: it needs {human_bytes(plan.need.total_bytes)}, "
        f"and {human_bytes(least)} with every choice that leaves the image as it is; {largest_part(plan)}",
        expected=f"at most {human_bytes(budget)} at any moment",
        fix=fix,
    )
