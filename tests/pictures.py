"""Draw the README's pictures from the gallery: `make pictures`. `test_docs.py` checks that they are up to date."""

from pathlib import Path

import torch

import circuitlab as cl
from circuitlab.gallery.gpt import GPT

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"


def pictures():
    """Name -> SVG text."""
    gpt = cl.trace(GPT(), torch.zeros(2, 16, dtype=torch.long))
    return {
        "gpt": gpt.svg(depth=2, batch=False),
        "attention": gpt["blocks.0.attention"].svg(depth=1, batch=False),
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / f"{name}.svg").write_text(text)
