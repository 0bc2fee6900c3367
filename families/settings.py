"""What a `config.json` beside a transformer says, and how it completes what the tensors say.

A setting goes by our name, a field of the family's configuration, or by that of the published program.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from ..errors import CheckpointError, RenamedWarning
from .base import ConfigT

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Entries that any such file may hold and that say nothing of the model.
# fmt: off
HOUSEKEEPING = frozenset((
    "_class_name", "_name_or_path", "architectures", "auto_map", "dtype", "model_type", "name_or_path",
    "torch_dtype", "transformers_version",
))
# Of the published programs: how they were trained, and how they compute what they compute.
TRAINING = frozenset((
    "attn_drop_rate", "cond_drop_rate", "drop_path_rate", "drop_rate", "diffusion_batch_mul",
    "diffusion_head_repeats", "rand_uncond", "latent_condition_weight", "vae_path", "customized_flash_attn",
    "flash_if_available", "fused_if_available", "fused_norm", "pad_to_multiplier", "use_flex_attn",
))
# fmt: on
RENAMED = {"levels": "max_scales"}  # read for one version more
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple[int, ...]: "[1, 2, ...]"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedNames:
    """How a family's published program writes its configuration.

    names: theirs -> ours. converted: theirs -> what makes settings of the value and all entries. only: entries of which
    one value alone is supported.
    """

    names: Mapping[str, str]
    converted: Mapping[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)


def settings_from_json(
    kind: type[DataclassInstance], data: Mapping[str, Any], published: PublishedNames
) -> dict[str, Any]:
    """Fields of a configuration that a `config.json` gives; not all of them need be there.

    Raises:
        CheckpointError: an entry that is not known or of the wrong type, a variant that is not supported, or two
            entries that contradict each other.
    """
    own, found = {known.name for known in fields(kind)}, dict[str, Any]()
    for given, value in data.items():
        name = RENAMED.get(given, given)
        if name != given:
            warnings.warn(f"config.json: {given} is named {name} now", RenamedWarning, stacklevel=2)
        if name in published.only:
            if value != published.only[name]:
                raise CheckpointError(f"{name}={value!r} is not supported", expected=repr(published.only[name]))
            continue
        if name in own or name in published.names:
            settings = {published.names.get(name, name): value}
        elif name in published.converted:
            settings = published.converted[name](value, data)
        elif name in HOUSEKEEPING | TRAINING:
            continue
        else:
            theirs = sorted({*published.names, *published.converted, *published.only} - own)
            raise CheckpointError(
                f"the configuration has an entry {name!r}, which is not known",
                expected=f"{', '.join(sorted(own))}; or as the published program has it {', '.join(theirs)}",
                fix="mend the name, or remove the entry if it says nothing of the model",
            )
        for field_name, setting in settings.items():
            checked = _of_type(kind, field_name, setting, name)
            if found.setdefault(field_name, checked) != checked:
                raise CheckpointError(f"the configuration says {field_name} {found[field_name]!r} and {checked!r}")
    return found


def completed(
    kind: type[ConfigT],
    read: Mapping[str, Any],
    given: Mapping[str, Any],
    published: Mapping[str, ConfigT],
    otherwise: Mapping[str, Any] | None = None,
) -> ConfigT:
    """A configuration from what the tensors say and what a `config.json` gives; nothing is guessed.

    What neither says is that of the published model whose tensors are the same.

    Args:
        read: fields that the tensors say.
        given: fields that config.json gives.
        published: the family's published sizes.
        otherwise: values of fields that the model does not depend on, where they are not given.

    Raises:
        CheckpointError: the two contradict each other, or a field is said by neither.
    """
    for name, value in given.items():
        if read.get(name, value) != value:
            raise CheckpointError(
                f"the transformer's tensors have {name} {read[name]!r}, its configuration says {value!r}",
                fix="give the config.json that belongs to this checkpoint",
            )
    found = {**(otherwise or {}), **given, **read}
    model = next((m for m in published.values() if all(getattr(m, n) == value for n, value in read.items())), None)
    missing = [f.name for f in fields(kind) if f.name not in found]
    if missing and model is None:
        entries = ", ".join(f'"{name}": {WORDS[_types(kind)[name]]}' for name in missing)
        raise CheckpointError(
            f"the transformer's tensors do not say its {' and '.join(missing).replace('_', ' ')}, "
            "and it is none of the published models",
            expected=f"{{{entries}}} in config.json beside the transformer",
            fix="write it there, from the configuration that the model was trained with",
        )
    return kind(**found, **{name: getattr(model, name) for name in missing})


def mlp_ratio(width_of: Callable[[int, float], int]) -> Callable[[Any, Mapping[str, Any]], dict[str, Any]]:
    """A converter of the published programs' `mlp_ratio`; without `embed_dim` beside it, it is left to the tensors.

    width_of: (width, ratio) -> width of the feed-forward.
    """

    def convert(ratio: Any, data: Mapping[str, Any]) -> dict[str, Any]:
        width = data.get("embed_dim")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1024:
            raise CheckpointError(f"the configuration says mlp_ratio {ratio!r}", expected="a number above 0, such as 4")
        return {"mlp_width": width_of(width, ratio)} if type(width) is int and 0 < width < 1 << 31 else {}

    return convert


def tell_assumed(what: str, key: str) -> None:
    """Of a value that the tensors fit, and others besides: it is taken, and said so."""
    _log.warning('%s; if they are others, give "%s" in config.json beside the transformer', what, key)


def _types(kind: type[DataclassInstance]) -> dict[str, Any]:
    return get_type_hints(kind)


def _of_type(kind: type[DataclassInstance], name: str, value: Any, entry: str) -> Any:
    """A JSON value as a field holds it."""
    wanted = _types(kind)[name]
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list | tuple) and wanted == tuple[int, ...]:
        if all(type(item) is int for item in value):
            return tuple(value)
    elif type(value) is wanted:
        return value
    raise CheckpointError(
        f"the configuration says {entry} {value!r}", expected=WORDS[wanted], fix=f"mend {entry} in config.json"
    )
