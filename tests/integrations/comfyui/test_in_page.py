"""The pack in ComfyUI's page, by Chromium: example workflows open from its templates, and run there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.browser import DONE_MS, chromium

from .process import NODES, ComfyUI, needs_comfyui
from .workflows import FILES, as_prompt, workflow

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [needs_comfyui, pytest.mark.browser]
READY = "window.app && window.app.graph && window.app.extensionManager"


@pytest.fixture(scope="module")
def page(server: ComfyUI) -> Iterator[Page]:
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1500, "height": 860}).new_page()
        page.set_default_timeout(DONE_MS)
        page.goto(server.url)
        page.wait_for_function(READY)
        yield page


def open_template(page: Page, name: str) -> None:
    """As a user does: Browse Templates, the pack, the picture."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(NODES, exact=True).first.click()
    dialog.get_by_text(name, exact=True).first.click()
    dialog.wait_for(state="hidden")
    page.wait_for_function(f"app.extensionManager.workflow.activeWorkflow?.filename.startsWith('{name}')")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_sends_of_an_example_workflow_what_it_says(page: Page, infos: dict[str, Any], file: Path):
    open_template(page, file.stem)
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    own = {node: {key: said[key] for key in ("class_type", "inputs")} for node, said in sent.items()}
    assert own == as_prompt(workflow(file.stem), infos)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_workflow_runs_and_shows_its_images(page: Page, infos: dict[str, Any], file: Path):
    open_template(page, file.stem)
    prompt = as_prompt(workflow(file.stem), infos)
    node, inputs = next((node, said["inputs"]) for node, said in prompt.items() if "prompt" in said["inputs"])
    page.get_by_role("button", name="Run", exact=True).click()
    saved = "app.graph.nodes.find((node) => node.type === 'SaveImage').imgs"
    page.wait_for_function(f"{saved}?.length === {inputs.get('images', 1)}")
    shown = page.evaluate(f"app.graph.getNodeById({node}).widgets.map((widget) => String(widget.value))")
    assert any(re.match(r"seeds? 7( to 10)?, guidance ", text) for text in shown), shown
