"""Captions to the frozen text encoder's features, for training and for evaluation in torch."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import T5EncoderModel


class TextFeatures:
    """Loads the text encoder once, in fp32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.encoder = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features [B, T, Ct] and mask [B, T] bool, T the longest caption of the batch."""
        ids = [torch.tensor(encoding.ids) for encoding in self.tokenizer.encode_batch(captions)]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).bool()
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return self.encoder(input_ids=padded, attention_mask=mask).last_hidden_state, mask
