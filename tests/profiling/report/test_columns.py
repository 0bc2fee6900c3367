"""Tables that are declared as columns."""

from io import StringIO
from types import SimpleNamespace

from rich.box import ASCII
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastvar.profiling.report.columns import Column, fact_table, text_table

ITEM = {"name": "attn_mlp", "ms": SimpleNamespace(median=1.25), "kept": None}


def shown(table: Table) -> list[list[str]]:
    console = Console(width=80, record=True, file=StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_a_value_is_a_key_an_attribute_or_a_function():
    assert Column("name").show(ITEM) == "attn_mlp"
    assert Column("time", "ms.median", "{:.1f}".format).show(ITEM) == "1.2"
    assert Column("length", lambda item: len(item["name"])).show(ITEM) == "8"
    assert Column("name", format=lambda name: Text(name, "red")).show(ITEM) == Text("attn_mlp", "red")


def test_a_value_of_none_is_an_empty_cell():
    assert Column("kept", format="{:,}".format).show(ITEM) == ""


def test_rows_feet_and_rows_that_are_cells_already():
    columns = [Column("name", justify="left", foot="total"), Column("ms", "ms.median", foot="1.25")]
    table = text_table(columns, [ITEM, ("decoder", "skipped")], box=ASCII)
    assert shown(table) == [["name", "ms"], ["attn_mlp", "1.25"], ["decoder", "skipped"], ["total", "1.25"]]
    assert not text_table([Column("name")], [ITEM]).show_footer


def test_a_row_has_the_style_of_its_item():
    table = text_table([Column("name")], [ITEM, ("x",)], lambda item: "dim" if isinstance(item, tuple) else None)
    assert [row.style for row in table.rows] == [None, "dim"]


def test_facts_are_not_read_as_markup():
    console = Console(width=80, record=True, file=StringIO())
    console.print(fact_table({"path": "[red]a"}))
    assert console.export_text().split() == ["path", "[red]a"]
