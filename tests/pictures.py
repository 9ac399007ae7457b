"""Draw the README's pictures from the gallery: `make pictures`. `test_docs.py` checks that they are up to date."""

from pathlib import Path

import torch

import circuitlab as cl
from circuitlab.gallery.attention import MultiHeadAttention
from circuitlab.gallery.gpt import GPT
from circuitlab.gallery.resnet import IdentityBlock
from circuitlab.gallery.unet import UNet

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"


def pictures():
    """File name -> SVG text."""
    gpt = cl.trace(GPT(), torch.zeros(2, 16, dtype=torch.long))
    heads = cl.trace(MultiHeadAttention(), torch.zeros(2, 7, 64), torch.zeros(2, 5, 64))
    block = cl.trace(IdentityBlock(16, 16).eval(), torch.zeros(2, 16, 32, 32))
    unet = cl.trace(UNet(), torch.zeros(2, 1, 32, 32))
    drawn = {}
    for theme in ("light", "dark"):
        drawn[f"gpt.{theme}.svg"] = gpt.svg(depth=2, batch=False, theme=theme)
        drawn[f"gpt_open.{theme}.svg"] = gpt.svg(depth=3, batch=False, theme=theme)
        drawn[f"multi_head.{theme}.svg"] = heads.svg(theme=theme, batch=False)
        drawn[f"identity_block.{theme}.svg"] = block.svg(theme=theme)
        drawn[f"unet.{theme}.svg"] = unet.svg(theme=theme, batch=False)
    return drawn


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / name).write_text(text)
