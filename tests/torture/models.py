"""The tiny model and its bundles that campaigns work on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fastvar
from tests.conftest import TINY_POLICY, TOKENIZER

SIZE = "256x256"
OTHER_POLICY = TINY_POLICY.replace("keep = 0.5", "keep = 0.25")


def tiny_checkpoint() -> Any:
    """The tests' tiny model: random weights that read the demo's words."""
    from transformers import T5Config

    from fastvar.export.checkpoints.random_weights import random_checkpoint_for
    from fastvar.families.infinity import ImageTokenizerConfig, TransformerConfig

    transformer = TransformerConfig(
        depth=2, width=64, heads=2, mlp_width=128, text_width=128, text_length=16, code_channels=8, chunks=1
    )
    images = ImageTokenizerConfig(bits=8, base_channels=24, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1)
    encoder = T5Config(
        vocab_size=40, d_model=128, d_kv=32, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return random_checkpoint_for(transformer, images, encoder, name="tiny", tokenizer_file=TOKENIZER)


class Workshop:
    """A folder with the tiny model, two policies, and an engine cache that both have filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = tiny_checkpoint()
        self.policies = {"half": folder / "half.toml", "quarter": folder / "quarter.toml"}
        self.policies["half"].write_text(TINY_POLICY)
        self.policies["quarter"].write_text(OTHER_POLICY)
        self.cache = folder / "cache"

    def build(self, out: Path, policy: str = "half", **options: Any) -> None:
        """Build in this process, from the cache what is there."""
        chosen = {"cache": self.cache, "jobs": 1, **options}
        fastvar.build(self.checkpoint, size=SIZE, policy=str(self.policies[policy]), out=out, **chosen)

    def rebuild(self, bundle: Path, out: Path, policy: str) -> None:
        from fastvar.export.rebuild import rebuild

        rebuild(bundle, out, policy=str(self.policies[policy]), cache=self.cache, jobs=1)

    def empty(self, name: str) -> Path:
        """A new folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path
