"""Golden scenes, drawn by both renderers, and golden code. `python -m tests.golden` writes them anew; look at the pictures before you commit."""

import json
from pathlib import Path

import torch

import circuitlab as cl
from circuitlab.diagram.layout import draw
from circuitlab.diagram.svg import render
from circuitlab.gallery import attention, gpt, mlp, resnet, unet, visual_attention

FOLDER = Path(__file__).parent


def scenes():
    """Name -> scene: the six architectures of the reference figures, a GPT, and names that are not meant well."""
    zeros = torch.zeros
    drawn = {
        "mlp": (mlp.Recogniser(), (zeros(4, 28, 28),), {}),
        "scaled_attention": (attention.ScaledDotProductAttention(), (zeros(2, 5, 8), zeros(2, 7, 8), zeros(2, 7, 8)), {}),
        "multi_head": (attention.MultiHeadAttention(), (zeros(2, 7, 64), zeros(2, 5, 64)), {}),
        "identity_resnet": (resnet.IdentityBlock(16, 32, 2), (zeros(2, 16, 32, 32),), {}),
        "unet": (unet.UNet(), (zeros(2, 1, 32, 32),), {}),
        "visual_attention": (visual_attention.VisualAttention(), (zeros(2, 64, 6, 9),), {}),
        "gpt": (gpt.GPT(), (zeros(2, 16, dtype=torch.long),), {"depth": 3, "batch": False}),
        "hostile": (hostile(), (zeros(2, 3),), {"depth": 2}),
    }
    for name, (model, inputs, options) in drawn.items():
        yield name, draw(cl.trace(model.eval(), *inputs), **options)


def hostile():
    """Module names are text: markup in them does nothing."""
    title = '<script>alert("x")</script>&\'\\ \u0001'
    inner = type(title, (torch.nn.Sequential,), {})(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3))
    model = torch.nn.Sequential()
    model.add_module("<img src=x onerror=alert(1)>", inner)
    model.add_module("last", torch.nn.Linear(3, 2))
    return model


def codes():
    """Name -> the code of two circuits."""
    made = {
        "gpt": (gpt.GPT(), (torch.zeros(2, 16, dtype=torch.long),)),
        "multi_head": (attention.MultiHeadAttention(), (torch.zeros(2, 7, 64), torch.zeros(2, 5, 64))),
    }
    for name, (model, inputs) in made.items():
        yield name, cl.trace(model, *inputs).to_torch(model).code


def write():
    """Write the golden files anew."""
    for name, code in codes():
        (FOLDER / f"{name}.txt").write_text(code)
    for name, scene in scenes():
        (FOLDER / f"{name}.json").write_text(json.dumps(scene.to_dict(), ensure_ascii=False, indent=0) + "\n")
        for theme in ("light", "dark"):
            (FOLDER / f"{name}.{theme}.svg").write_text(render(scene, theme))


