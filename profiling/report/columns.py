"""Tables declared as columns: heading, value, format, alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import JustifyMethod, OverflowMethod
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """One column of a table over items.

    `value` is a function of the item, or its key or attribute ("ms.median" is one of an attribute's); the heading by
    default. A value of None is an empty cell. `foot` is shown below the table.
    """

    heading: str
    value: str | Callable[[Any], Any] = ""
    format: Callable[[Any], str | Text] = str
    justify: JustifyMethod = "right"
    foot: str = ""
    overflow: OverflowMethod = "ellipsis"
    style: str | None = None

    def of(self, item: Any) -> Any:
        """The value of an item."""
        if callable(self.value):
            return self.value(item)
        for name in (self.value or self.heading).split("."):
            item = item[name] if isinstance(item, Mapping) else getattr(item, name)
        return item

    def show(self, item: Any) -> str | Text:
        """The cell of an item."""
        value = self.of(item)
        return "" if value is None else value if isinstance(value, Text) else self.format(value)


def text_table(
    columns: Sequence[Column],
    items: Iterable[Any],
    style: Callable[[Any], str | None] = lambda _: None,
    no_wrap: bool = False,
    **options: Any,
) -> Table:
    """A table for the terminal. A tuple among the items holds the cells of its row; `options` are those of Rich."""
    table = Table(show_footer=any(column.foot for column in columns), **options)
    for c in columns:
        table.add_column(c.heading, c.foot, justify=c.justify, overflow=c.overflow, no_wrap=no_wrap, style=c.style)
    for item in items:
        cells = item if isinstance(item, tuple) else [column.show(item) for column in columns]
        table.add_row(*cells, style=style(item))
    return table


def fact_table(facts: Mapping[str, str]) -> Table:
    """Names in bold beside their values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table
