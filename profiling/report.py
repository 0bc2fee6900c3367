"""A profile as one HTML page that stands alone: style and plots inline, images as data, nothing from a network.

Whatever comes from outside (prompt, paths, names) is escaped where it enters the page.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from ..engines.dtypes import human_bytes
from . import plots
from .figures import flop, milliseconds, percent, times
from .kept_images import gradient, heat_map, picture
from .records import BundleProfile, KeptMap, Profile
from .report_tables import engine_table, gauges, stage_table
from .sampler import INTERVAL_S

WIDE, HALF, NARROW = 1036.0, 500.0, 330.0  # pixels of a plot: across the page, beside another, on a phone
NOISY = 1.5  # a 95th percentile this many times the median says that the machine was busy
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser, too, refuses the network


def report(profile: Profile) -> str:
    """The page."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = escape(f"fastvar profile: {_title(profile)}")
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="generator" content="fastvar profile">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>',
            f"<style>{style}</style></head><body>",
            _header(profile),
            f"<main>{''.join(_sections(profile))}</main>",
            _footer(profile),
            "</body></html>\n",
        )
    )


def _title(profile: Profile) -> str:
    versus = f" against {profile.against.label}" if profile.against else ""
    return f"{profile.subject.label}{versus}"


def _sections(profile: Profile) -> list[str]:
    return [_headline(profile), _latency(profile), _kinds(profile), _memory(profile), *_kept(profile),
            _tables(profile), _method(profile)]  # fmt: skip


def _section(title: str, lede: str, *content: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="lede">{escape(lede)}</p>{"".join(content)}</section>'


def _header(profile: Profile) -> str:
    facts, prompt = profile.subject.facts, profile.settings["prompt"]
    line = f"{facts['model']} at {facts['size']}, {facts['precision']}, {facts['backend']}, batch 1"
    drawn = f'<p class="prompt">“{escape(prompt)}”</p>' if prompt is not None else ""
    return (
        f'<header><p class="eyebrow">fastvar profile</p><h1>{escape(_title(profile))}</h1>'
        f'<p class="muted">{escape(line)}</p>{drawn}{_noise_note(profile)}</header>'
    )


def _noise_note(profile: Profile) -> str:
    spreads = [bundle.totals["image"] for bundle in profile.bundles]
    if all(found.p95 < NOISY * found.median for found in spreads):
        return ""
    return (
        '<p class="note">Runs differed widely: their 95th percentile is over '
        f"{NOISY:g} times the median. The machine was probably busy with other work; measure again when it is not.</p>"
    )


# Headline figures


def _headline(profile: Profile) -> str:
    cards = [
        _time_card(profile, "Image", "image"),
        _time_card(profile, "All scales", "scales"),
        _memory_card(profile),
        _work_card(profile),
        _token_card(profile),
    ]
    return f'<ul class="headline">{"".join(cards)}</ul>'


def _card(what: str, figure: str, *beside: str) -> str:
    """`beside` is HTML."""
    return (
        f'<li><span class="what">{escape(what)}</span><span class="figure">{escape(figure)}</span>'
        f'<span class="beside">{"<br>".join(filter(None, beside))}</span></li>'
    )


def _time_card(profile: Profile, what: str, part: str) -> str:
    found, speedup = profile.subject.totals[part], profile.speedup(part)
    gain = ""
    if speedup is not None and profile.against is not None:
        word = "faster than" if speedup >= 1 else "of the speed of"
        gain = f'<span class="gain">{times(speedup)}</span> {word} {escape(profile.against.label)}'
    return _card(what, milliseconds(found.median), f"95 % within {milliseconds(found.p95)}", gain)


def _memory_card(profile: Profile) -> str:
    recording = profile.subject.memory.recording
    other = ""
    if profile.against is not None:
        other = f"{escape(profile.against.label)}: {human_bytes(profile.against.memory.recording.peak_bytes)}"
    budget = ""
    if recording.budget_bytes is not None and recording.headroom_bytes is not None:
        inside = f"{human_bytes(recording.headroom_bytes)} below the budget of {human_bytes(recording.budget_bytes)}"
        over = f'<span class="over">{human_bytes(-recording.headroom_bytes)} over the budget</span>'
        budget = over if recording.over_budget else inside
    return _card("Peak memory", human_bytes(recording.peak_bytes), budget, other)


def _work_card(profile: Profile) -> str:
    work = profile.subject.cost.flop
    achieved = work / profile.subject.totals["image"].median * 1e3
    other = f"{escape(profile.against.label)}: {flop(profile.against.cost.flop)}" if profile.against else ""
    return _card("Arithmetic", flop(work), f"at {flop(achieved, 'FLOP/s')}", other)


def _token_card(profile: Profile) -> str:
    count = profile.subject.facts["forwarded_tokens"]
    against = profile.against
    other = f"{escape(against.label)}: {against.facts['forwarded_tokens']:,}" if against else ""
    return _card("Tokens forwarded", f"{count:,}", f"through {profile.subject.facts['layers']} layers", other)


# Plots


def _both(plot: Callable[[float, str], str], wide: float = WIDE) -> str:
    """For wide and for narrow screens; the style shows one of them."""
    return plot(wide, "wide") + plot(NARROW, "narrow")


def _each(profile: Profile, plot: Callable[[BundleProfile, float, str], str]) -> str:
    """One plot per bundle, side by side where there is room."""

    def one(bundle: BundleProfile) -> str:
        name = f"<h3>{escape(bundle.label)}</h3>" if profile.against else ""
        return f"<div>{name}{_both(lambda width, kind: plot(bundle, width, kind), HALF)}</div>"

    return f'<div class="{"pair" if profile.against else "alone"}">{"".join(map(one, profile.bundles))}</div>'


def _key(profile: Profile) -> str:
    if profile.against is None:
        return ""
    labels = ((plots.SERIES[0], profile.against.label), (plots.SERIES[1], profile.subject.label))
    return f'<ul class="key">{"".join(f"<li><i class={style}></i>{escape(name)}</li>" for style, name in labels)}</ul>'


def _latency(profile: Profile) -> str:
    lede = "Milliseconds of every stage: the median of all runs as a bar, the 95th percentile as a line."
    if profile.against is not None:
        lede += " At the right, how many times faster."
    plot = _both(lambda width, kind: plots.latency(profile, width, kind))
    return _section("Latency per scale", lede, _key(profile), plot)


def _kinds(profile: Profile) -> str:
    first, share = plots.kind_shares(profile.subject)[0]
    lede = (
        "Time by kind of engine over the whole image, the largest first, timed launch by launch. "
        f"In {profile.subject.label} the largest is {first}: {percent(share)}."
    )
    return _section("Where the time goes", lede, _each(profile, plots.cumulative))


def _memory(profile: Profile) -> str:
    top = plots.memory_top([bundle.memory for bundle in profile.bundles])
    lede = (
        "From before the bundle is loaded until its first image is drawn, in a process of its own. "
        f"The peak is the {profile.subject.memory.recording.peak.source}."
    )
    plot = _each(profile, lambda bundle, width, kind: plots.memory(bundle, top, width, kind))
    return _section("Memory over time", lede, plot)


# What was kept where


def _kept(profile: Profile) -> list[str]:
    pruned = [bundle for bundle in profile.bundles if bundle.kept]
    if not pruned:
        return []
    lede = (
        "At a pruned scale every layer and sub-layer selects its own tokens. Each cell is one token of the "
        "conditional row: the brighter, the more of these selections kept it."
    )
    figures = "".join(_figures(profile, bundle) for bundle in profile.bundles)
    legend = f'<p class="scale">kept by none<i style="background:{gradient()}"></i>kept by all</p>'
    return [_section("What was kept where", lede, f'<div class="maps">{figures}</div>', legend)]


def _figures(profile: Profile, bundle: BundleProfile) -> str:
    name = escape(bundle.label)
    settings = profile.settings
    drawn = f'<figure><img src="{picture(bundle.image_png)}" alt="The image as {name} draws it">'
    drawn += f"<figcaption><b>{name}</b>, seed {settings['seed']}</figcaption></figure>"
    return drawn + "".join(_heat_figure(bundle, kept) for kept in bundle.kept)


def _heat_figure(bundle: BundleProfile, kept: KeptMap) -> str:
    height, width = kept.size
    counts = [count for line in kept.counts for count in line]
    told = f"{kept.kept} of {len(counts)} tokens kept in each of {kept.selections} selections"
    extremes = f"{counts.count(kept.selections)} tokens kept by all, {counts.count(0)} by none"
    grid = f"{width}×{height}"  # noqa: RUF001
    alt = escape(f"Heat map over the image of {bundle.label}, scale {kept.scale}: {told}; {extremes}")
    return (
        f'<figure><img src="{heat_map(bundle.image_png, kept)}" alt="{alt}">'
        f"<figcaption><b>{escape(bundle.label)}, scale {kept.scale}, {grid}</b>: {told}; {extremes}</figcaption>"
        "</figure>"
    )


# Tables and how it was measured


def _tables(profile: Profile) -> str:
    lede = (
        "Tokens are per guidance row. FLOP are those of matrix products, attention and convolutions; bytes are every "
        "bound tensor once, the least that can be moved."
    )
    parts = [stage_table(bundle) for bundle in profile.bundles]
    engines = "".join(engine_table(bundle) for bundle in profile.bundles)
    return _section("All figures", lede, *parts, f"<details><summary>Engine by engine</summary>{engines}</details>")


def _draws(settings: dict[str, Any]) -> str:
    """What a family draws by besides top_p."""
    return "".join(f"{name} {settings[name]:g}, " for name in ("tau", "top_k") if settings.get(name) is not None)


def _method(profile: Profile) -> str:
    s = profile.settings
    turns = " The two bundles took turns, image by image, in the same process." if profile.against else ""
    text = "the prompt's" if s["prompt"] is not None else "random numbers, as the bundle has no text encoder"
    lines = (
        f"{s['runs']} whole images after {s['warm_up']} to warm up, which are not counted.{turns}",
        "Stages are timed on the device's clock. A whole image is text, scales and decoder; saving it is not timed.",
        f"Then {s['runs']} images launch by launch, waiting for each one, after one to warm up: the times of the "
        "engines. Their sum is more than that of whole images where launches overlap or are recorded as one.",
        "Percentiles are over runs, interpolated between neighbours.",
        f"Memory: each bundle alone in a fresh process, sampled every {INTERVAL_S * 1e3:g} ms and behind every launch. "
        + _peak_line(profile),
        f"Seed {s['seed']}, guidance scale {s['guidance_scale']:g} ({s['guidance_rows']} rows), {_draws(s)}"
        f"top_p {s['top_p']:g}; text features are {text}.",
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return _section(
        "How it was measured", f"{_when(profile)}, {_machine(profile)}", f"<ul>{items}</ul>", _facts(profile)
    )


def _peak_line(profile: Profile) -> str:
    return " ".join(
        f"{bundle.label}: {human_bytes(bundle.memory.recording.before_bytes)} before, "
        f"{human_bytes(bundle.memory.recording.peak_bytes)} at the peak."
        for bundle in profile.bundles
    )


def _when(profile: Profile) -> str:
    return profile.when.replace("T", " ").replace("+00:00", " UTC")


def _machine(profile: Profile) -> str:
    e = profile.environment
    gpu = f"{e['gpu']['name']}, " if "gpu" in e else ""
    return f"{gpu}{e['cpu']}, {e['cpu_cores']} cores"


def _facts(profile: Profile) -> str:
    e, threads = profile.environment, profile.settings["threads"]
    told = {
        "hardware": f"{_machine(profile)}, {human_bytes(e['memory_bytes']) if e['memory_bytes'] else 'unknown'} memory",
        "CPU features": " ".join(e["cpu_features"]) or "unknown",
        "versions": f"fastvar {e['fastvar']}, Python {e['python']}, {e['platform']}",
        "engines": f"{e['backend']}, target {e['target']}, {e['precision']}",
        "CPU threads": "the library's choice" if threads is None else str(threads),
    }
    for bundle in profile.bundles:
        f = bundle.facts
        told[bundle.label] = (
            f"{f['path']}, policy {f['policy']}, weights {human_bytes(f['weight_bytes'])}, KV cache "
            f"{human_bytes(bundle.kv_cache_bytes)}, digest {f['digest'][:16]}"
        )
        told |= {f"{bundle.label}: {name}": value for name, value in gauges(bundle.memory.recording.samples).items()}
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in told.items())}</dl>"


def _footer(profile: Profile) -> str:
    version = profile.environment["fastvar"]
    return f"<footer>fastvar {escape(version)}. The same figures: profile.json, profile.csv, trace.json.</footer>"
