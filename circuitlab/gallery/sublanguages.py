"""A small language model of four sub-languages: what modules of neurons look like where there is something to divide.

Each document is written in one of four sub-languages. They share 16 words and have 24 words each of their own. Which words
may follow a word is drawn at random for each sub-language, so a shared word goes on differently in each, and the model has
to remember where it is. The model, a plain GPT with ReLU feed-forward networks, sees neither the labels nor any hint of
modules: whatever division its neurons show, training made.

    python -m circuitlab.gallery.sublanguages -o model.safetensors

trains it, in under a minute on two CPU cores, and writes its parameters; `load` reads them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitlab.errors import FileFormatError, InputError
from circuitlab.gallery.gpt import GPT

LANGUAGES = {"bodega": "bdg", "kapito": "kpt", "lumina": "lmn", "rosazo": "rsz"}
"""Each sub-language and the consonants of its own words."""
SHARED = ("the", "a", "of", "and", "to", "in", "is", "that", "it", "for", "on", "with", "as", "at", "by", "not")
OWN = 24
CHANCES = (0.5, 0.3, 0.15, 0.05)
"""Of the words that may come next."""
OWN_SHARE = 0.6
"""How likely it is that a word which may come next is one of the sub-language's own."""
LENGTH = 32
BATCH = 32
STEPS = 800
CHECKPOINTS = (0, 25, 50, 100, 200, 400, 600, 800)


class Corpus:
    """Four sub-languages, drawn from a seed. In each, four words may follow a word, with chances .5, .3, .15 and .05.

    Attributes:
        names: the vocabulary: 16 shared words, then 24 of each sub-language.
        languages: names of the sub-languages.
        floor: entropy of the chances, in nats per token: no model's mean cross-entropy can be below it.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.languages = tuple(LANGUAGES)
        self.names = SHARED + tuple(word for consonants in LANGUAGES.values() for word in _words(consonants, generator))
        self.floor = -sum(chance * math.log(chance) for chance in CHANCES)
        weight = torch.tensor([(1 - OWN_SHARE) / len(SHARED)] * len(SHARED) + [OWN_SHARE / OWN] * OWN, device="cpu")
        words = len(LANGUAGES) * len(weight)
        drawn = torch.multinomial(weight.expand(words, -1), len(CHANCES), generator=generator)
        self._next = drawn.view(len(LANGUAGES), len(weight), len(CHANCES))

    def documents(self, count: int, length: int = LENGTH, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Documents drawn at random: tokens (count, length), and the number of each one's sub-language (count,)."""
        generator = torch.Generator().manual_seed(seed)
        language = torch.randint(len(self.languages), (count,), generator=generator, device="cpu")
        words = torch.randint(len(SHARED) + OWN, (count, length), generator=generator, device="cpu")  # the first one stays
        chances = torch.tensor(CHANCES, device="cpu")
        choice = torch.multinomial(chances, count * length, replacement=True, generator=generator).view(count, length)
        for x in range(1, length):
            words[:, x] = self._next[language, words[:, x - 1], choice[:, x]]
        return torch.where(words < len(SHARED), words, words + OWN * language[:, None]), language


def _words(consonants: str, generator: torch.Generator) -> list[str]:
    """Words of two syllables, all different."""
    syllables = [consonant + vowel for consonant, vowel in product(consonants, "aeiou")]
    every = [first + second for first, second in product(syllables, syllables)]
    return sorted(every[i] for i in torch.randperm(len(every), generator=generator, device="cpu")[:OWN].tolist())


class Trained(NamedTuple):
    """A trained model, and documents that it has not seen.

    Attributes:
        model: in eval mode.
        batches: of held-out documents, each (tokens (b, x), the tokens that come next (b, x)).
        labels: the sub-language of each held-out document.
        names: the vocabulary.
        checkpoints: training step -> the parameters then; the last is the model's.
        loss: mean cross-entropy on the held-out documents, in nats per token.
        floor: what no model can fall below.
    """

    model: GPT
    batches: list[tuple[Tensor, Tensor]]
    labels: list[str]
    names: tuple[str, ...]
    checkpoints: dict[int, dict[str, Tensor]]
    loss: float
    floor: float


def train(
    steps: int = STEPS, checkpoints: Iterable[int] = CHECKPOINTS, held_out: int = 256, seed: int = 0, *, progress: bool = True,
) -> Trained:
    """Train the model. The same seed gives the same corpus, and on the same machine the same model.

    Args:
        steps: of AdamW, each on 32 new documents of 32 words.
        checkpoints: steps after which the parameters are kept, 0 for before the first; the last step always is.
        held_out: how many documents to keep for `Trained.batches`.
        seed: of the corpus, the first parameters and the order of the documents. Random state of torch stays as it is.
        progress: show a progress bar.

    Raises:
        InputError: no steps, or no held-out documents.
    """
    from tqdm.auto import trange

    if steps < 1 or held_out < 1:
        raise InputError(f"steps={steps} and held_out={held_out} must both be at least 1")
    corpus = Corpus(seed)
    model = _model(len(corpus.names), seed)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps + 1, pct_start=0.1)
    documents, _ = corpus.documents(steps * BATCH, LENGTH + 1, seed=2 * seed + 1)
    wanted = {*checkpoints, steps}
    kept = {0: _copy(model)} if 0 in wanted else {}
    bar = trange(1, steps + 1, desc="training on four sub-languages", disable=not progress, leave=False)
    for step in bar:
        batch = documents[(step - 1) * BATCH : step * BATCH]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step in wanted:
            kept[step] = _copy(model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", floor=f"{corpus.floor:.3f}")
    return _tested(model.eval(), corpus, held_out, seed, kept)


def save(trained: Trained, path: str | Path, seed: int = 0) -> Path:
    """Write the parameters as ``.safetensors``, with the seed that the corpus was made with.

    Raises:
        InputError: another suffix.
    """
    from safetensors.torch import save_model

    path = _named(path)
    save_model(trained.model, str(path), {"sublanguages": json.dumps({"seed": seed})})
    return path


def _named(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"the model is saved as .safetensors, not {path.name!r}: try {path.with_suffix('.safetensors').name!r}")
    return path


def load(path: str | Path, held_out: int = 256) -> Trained:
    """Read what `save` wrote; the held-out documents are made anew, and there are no checkpoints.

    Raises:
        FileFormatError: not a file that `save` wrote.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    try:
        with safe_open(path, "pt") as file:
            seed = json.loads((file.metadata() or {})["sublanguages"])["seed"]
        corpus = Corpus(seed)
        model = _model(len(corpus.names), seed)
        load_model(model, path)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{path} is no model of sub-languages that was saved here ({type(error).__name__}: {error})") from None
    return _tested(model.eval(), corpus, held_out, seed, {})


def _model(vocabulary: int, seed: int) -> GPT:
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.manual_seed(seed)
        model = GPT(vocabulary, LENGTH, width=64, heads=4, layers=2, activation=F.relu, tied=False)
        for embedding in (model.tokens, model.positions):
            nn.init.normal_(embedding.weight, std=0.1)
    return model


def _copy(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _tested(model: GPT, corpus: Corpus, held_out: int, seed: int, kept: dict[int, dict[str, Tensor]]) -> Trained:
    """The model with new documents, and its loss on them."""
    documents, language = corpus.documents(held_out, LENGTH + 1, seed=2 * seed + 2)
    batches = [(part[:, :-1], part[:, 1:]) for part in documents.split(BATCH)]
    with torch.no_grad():
        loss = sum(float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")) for x, y in batches)
    labels = [corpus.languages[number] for number in language.tolist()]
    return Trained(model, batches, labels, corpus.names, kept, loss / (held_out * LENGTH), corpus.floor)


def main(arguments: list[str] | None = None) -> None:
    """Train, save, and tell the loss."""
    parser = argparse.ArgumentParser(prog="python -m circuitlab.gallery.sublanguages", description="Train the model of four sub-languages.")
    parser.add_argument("-o", "--output", required=True, help="where to write the parameters, *.safetensors")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    path = _named(given.output)
    trained = train(given.steps, seed=given.seed)
    save(trained, path, given.seed)
    chance = math.log(len(trained.names))
    print(f"{path}: {trained.loss:.3f} nats per token (least possible {trained.floor:.3f}, chance {chance:.3f})")


if __name__ == "__main__":
    main()
