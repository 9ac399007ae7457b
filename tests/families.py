"""Every model family of transformers in small: traced, verified on numbers and drawn.

Each family is built from its own default configuration, shrunk by what its fields are called, with random weights.
What came out is kept in ``tests/.families/``, one file for each family, so that a sweep can go on where it stopped, and
written as a table to ``docs/families.md``.

    python -m tests.families [--jobs 2] [--only bert,vit] [--again REGEX] [--table]
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

CACHE = Path(__file__).parent / ".families"
TABLE = Path(__file__).parent.parent / "docs" / "families.md"
LIMIT = 120
"""Seconds of processor time for one family, so that what else the machine does changes nothing."""
MEMORY = 9 << 30
PARAMETERS = 40_000_000

SIZES = ((16, True, False), (8, True, False), (8, True, True), (8, False, False), (4, True, True), (2, False, False),
         (1, False, False))
"""What to try: by how much widths are divided, whether pictures are cut, whether heads go or get thinner."""

HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ CAUSAL_LM MASKED_LM IMAGE_TEXT_TO_TEXT CTC IMAGE_CLASSIFICATION "
    "VIDEO_CLASSIFICATION AUDIO_CLASSIFICATION SEMANTIC_SEGMENTATION OBJECT_DETECTION DEPTH_ESTIMATION"
).split()
"""Kinds of head, the first that a family has is built: with a head, the residual wire is inside, and can be tested."""


# which families there are ----------------------------------------------------------------------------------


def families() -> dict[str, list[str]]:
    """Model type -> classes to try. A family without a class of its own is none."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    mappings = {
        name.removeprefix("MODEL_").removeprefix("FOR_").removesuffix("MAPPING_NAMES").strip("_"): getattr(auto, name)
        for name in dir(auto)
        if name.startswith("MODEL") and name.endswith("MAPPING_NAMES")
    }
    rest = [name for name in mappings if name not in HEADS and name]
    found: dict[str, list[str]] = {}
    for family in set().union(*mappings.values()):
        classes: list[str] = []
        for name in (*HEADS, "", *rest):
            given = mappings[name].get(family, ())
            classes += [given] if isinstance(given, str) else given
        found[family] = list(dict.fromkeys(classes))[:4]

    def foreign(family: str) -> bool:
        return not found[family][0].startswith(CONFIG_MAPPING_NAMES.get(family, "Config").removesuffix("Config"))

    owner: dict[str, str] = {}
    for family in sorted(found, key=lambda family: (foreign(family), len(family), family)):
        owner.setdefault(found[family][0], family)
    return {family: found[family] for family in sorted(owner.values())}


# a small configuration ---------------------------------------------------------------------------------------

_WIDTH = re.compile(
    r"size|dim|width|channels|filters|d_model|d_ff|d_kv|d_inner|embd|inner|rank|hidden|embed|section|planes|features|out$"
)
_NO_WIDTH = re.compile(
    r"image|patch|vocab|position|window|kernel|codebook|crop|chunk|block|batch|stride|tile|num_|max_|grid|pool|bucket|frame"
    r"|token|scale|ratio|label|resolution|n_mels|sampling|rate|merge|step|video|temporal"
)
_LAYERS = re.compile(r"(^|_)(layers?|blocks?|depths?|n_layer|bottlenecks?|repeats)$|^num_.*layers_per|self_attends")


def tiny(kind, divisor: int, image: bool, heads: bool):
    """A configuration of a class, made small by the names of its fields.

    Widths are divided by one number, so that what is a multiple of what stays so; counts of layers, experts and words
    are cut. With ``heads``, the number of heads is divided instead of their size; with ``image``, pictures are cut.
    """
    whole = kind().to_dict()
    ids = itertools.count(1)

    def token(value):
        return 128 - next(ids) if isinstance(value, int) and value >= 128 else value

    def divided(value):
        if type(value) in (list, tuple):
            whole = all(type(item) is not int or item % divisor == 0 for item in value)
            return [divided(item) for item in value] if whole else value
        return value // divisor if type(value) is int and value >= 16 and value % divisor == 0 else value

    def counted(value, most):
        if type(value) in (list, tuple):
            return [counted(item, most) for item in value]
        return min(value, most) if type(value) is int else value

    def small(fields: dict) -> dict:
        layers, picked = _layers(fields)
        kept = len(picked)
        lengths = {len(value) for value in fields.values() if isinstance(value, list)}
        made = {}
        for key, value in fields.items():
            if key == "prediction_length" and value is None:
                value = 8
            elif isinstance(value, dict):
                value = small(value) if value and all(isinstance(k, str) for k in value) else value
            elif isinstance(value, list) and layers and len(value) == layers and not key.endswith("sizes"):
                value = [value[number] for number in picked]
            elif key in ("out_features", "out_indices") and layers:
                value = _stages(value, kept)
            elif re.search(r"layer.*(indices|indexes|idx|ids)$", key) and isinstance(value, list):
                value = [v for v in value if isinstance(v, int) and v < kept] or [kept - 1]
            elif isinstance(value, list) and "tokens" in key:
                value = [item for item in value if isinstance(item, int) and item < 128] or None
            elif re.search(r"_(token_)?(id|ids|index|idx)$", key):
                value = [token(v) for v in value] if isinstance(value, list) else token(value)
            elif key == "num_hidden_layers" and kept:
                value = kept
            elif "vocab_size" in key or key.endswith("num_embeddings"):
                value = counted(value, 128)
            elif re.search(r"codebook_size|codebook_vocab", key):
                value = counted(value, 64)
            elif re.search(r"experts_per|top_?k$", key):
                value = counted(value, 2)
            elif re.search(r"^n_group|expert_groups?$|topk_group|first_k_dense|n_shared", key):
                value = counted(value, 1)
            elif key == "num_kv_shared_layers":
                value = 0
            elif key.endswith("experts"):
                value = counted(value, 4)
            elif re.search(r"_(period|interval|offset|every_n_layers|freq)$", key):
                value = counted(value, 1 if key.endswith("offset") else 2)
            elif _LAYERS.search(key):
                value = value if type(value) is int and value in lengths else counted(value, 2)
            elif heads and re.search(r"head_dim|d_kv|rope_dim|nope_dim|v_head", key):
                pass
            elif heads and re.search(r"heads$|n_head$", key):
                value = max(1, value // divisor) if type(value) is int else value
            elif re.search(r"position|max_(source|target|seq|length)", key):
                value = counted(value, 128) if divisor > 1 else value
            elif key in ("image_size", "img_size", "input_size") and image:
                value = _image(value, fields)
            elif _WIDTH.search(key) and not _NO_WIDTH.search(key) and not isinstance(value, bool):
                value = divided(value)
            made[key] = value
        width, count = made.get("hidden_size"), made.get("num_attention_heads")
        if type(width) is int and type(count) is int and "head_dim" not in made and width % count:
            made["num_attention_heads"] = math.gcd(width, count)
        return made

    fields = small(whole)
    for key in ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype"):
        fields.pop(key, None)
    return kind(**fields)


def _layers(fields: dict) -> tuple[int, list[int]]:
    """How many layers there are, and which are needed to have one of each type."""
    layers = fields.get("num_hidden_layers") or fields.get("n_layer") or fields.get("num_layers")
    if not isinstance(layers, int):
        return 0, []
    first = {0, min(layers, 2) - 1}
    for value in fields.values():
        if isinstance(value, list) and len(value) == layers and all(isinstance(v, (str, int)) for v in value):
            first |= {value.index(v) for v in set(value)}
    stages = fields.get("out_features") or fields.get("out_indices") or ()
    together = max(max(first) + 1, len(stages))
    return layers, list(range(together)) if together <= 8 else sorted(first)[:8]


def _stages(value, count: int):
    """Of the layers whose outputs are used: as many, of fewer."""
    if not isinstance(value, list):
        return value
    numbers = range(count - len(value) + 1, count + 1)
    return [f"stage{n}" if isinstance(v, str) else n for n, v in zip(numbers, value, strict=True)]


def _image(value, fields: dict):
    if isinstance(value, (list, tuple)):
        return [_image(item, fields) for item in value]
    patch = fields.get("patch_size")
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    if not isinstance(value, int) or value <= 64:
        return value
    return 4 * patch if isinstance(patch, int) and patch > 7 else 64 if patch is None else 32 * patch


# inputs --------------------------------------------------------------------------------------------------------


class Inputs:
    """Inputs by the names that forwards give them. Where it depends, a list of shapes to try."""

    def __init__(self, config) -> None:
        self.config = config
        self.fields = list(_all_fields(config))

    def find(self, *names: str, default=None):
        """The first configuration field of such a name that is set, in this or an inner configuration."""
        for name in names:
            for fields in self.fields:
                value = fields.get(name)
                if value is not None and not isinstance(value, (dict, str)):
                    return value
        return default

    def number(self, *names: str, default: int) -> int:
        value = self.find(*names, default=default)
        value = value[-1] if isinstance(value, (list, tuple)) else value
        return int(value)

    def make(self, name: str) -> list:
        """Candidates for an input; none where it is not known what it should be."""
        import torch

        width = self.number("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", default=32)
        side = self.number("image_size", "img_size", "input_size", default=64)
        channels = self.number("num_channels", "in_channels", "in_chans", default=3)
        channels = channels if channels <= 4 else 3
        frames = self.number("num_frames", "frames_per_clip", default=2)
        mel = self.number("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "num_mel_bins_", default=80)
        time = 2 * self.number("max_source_positions", default=32)
        words = min(self.number("vocab_size", default=100), 100)

        def ids(*shape):
            return torch.randint(3, max(words, 4), shape)

        ones, image = torch.ones(2, 7, dtype=torch.long), torch.randn(2, channels, side, side)
        clip = torch.randn(2, frames, channels, side, side)
        known = {
            "input_ids": lambda: [ids(2, 7), ids(2, 16), ids(2, self.number("num_codebooks", default=4), 7),
                                  ids(2, 7, self.number("num_codebooks", default=4))],
            "decoder_input_ids": lambda: [ids(2, 5), ids(2, 5, self.number("num_codebooks", "num_channels", default=4))],
            "attention_mask": lambda: [ones], "decoder_attention_mask": lambda: [torch.ones(2, 5, dtype=torch.long)],
            "token_type_ids": lambda: [torch.zeros_like(ones)], "position_ids": lambda: [torch.arange(7).expand(2, 7)],
            "bbox": lambda: [torch.randint(0, 90, (2, 7, 4)).sort(-1).values, torch.rand(2, 7, 8)],
            "pixel_values": lambda: [image, clip, torch.randn(2, 1, channels, side, side)],
            "pixel_values_videos": lambda: [clip],
            "pixel_mask": lambda: [torch.ones(2, side, side, dtype=torch.long)],
            "input_features": lambda: [torch.randn(2, mel, time), torch.randn(2, 65, mel), torch.randn(2, 1, 64, mel)],
            "input_values": lambda: [torch.randn(2, 4000), torch.randn(2, 1, 4000),
                                     torch.randn(2, self.number("max_length", default=64), mel)],
            "input_features_mask": lambda: [torch.ones(2, time, dtype=torch.long)],
            "feature_attention_mask": lambda: [torch.ones(2, time, dtype=torch.long)],
            "inputs_embeds": lambda: [torch.randn(2, 7, width)], "hidden_states": lambda: [torch.randn(2, 7, width)],
            "spectrogram": lambda: [torch.randn(2, 20, mel), torch.randn(2, mel, 20)],
            "inputs": lambda: [ids(2, 7), torch.randn(2, 7, self.number("d_model", default=32))],
            "flattened_patches": lambda: [torch.rand(2, 6, 2 + 3 * self.number("patch_size", default=16) ** 2)],
            "audio_mel": lambda: [torch.randn(2, mel, 64)],
            "states": lambda: [torch.randn(2, 5, self.number("state_dim", default=17))],
            "actions": lambda: [torch.randn(2, 5, self.number("act_dim", default=4))],
            "rewards": lambda: [torch.randn(2, 5, 1)], "returns_to_go": lambda: [torch.randn(2, 5, 1)],
            "timesteps": lambda: [torch.arange(5).expand(2, 5)],
            "audio_codes": lambda: [ids(2, self.number("num_codebooks", "num_quantizers", default=4), 7)],
            **self._series(),
        }
        if name.endswith(("_embeds", "_hidden_states")):
            name = "inputs_embeds"
        return known[name]() if name in known else []

    def _series(self) -> dict:
        """Inputs of forecasting models."""
        import torch

        length = self.number("context_length", "prediction_length", default=16)
        lags = self.find("lags_sequence", default=[0])
        past = length + (max(lags) if isinstance(lags, (list, tuple)) and lags else 0)
        future = self.number("prediction_length", default=8)
        several = self.number("num_input_channels", "input_size", default=1)
        features = max(self.number("num_time_features", default=0), 0)
        return {
            "past_values": lambda: [torch.randn(2, past), torch.randn(2, past, several), torch.randn(2, length)],
            "past_time_features": lambda: [torch.randn(2, past, features)],
            "past_observed_mask": lambda: [torch.ones(2, past), torch.ones(2, past, several)],
            "future_values": lambda: [torch.randn(2, future)],
            "future_time_features": lambda: [torch.randn(2, future, features)],
        }

    def attempts(self, model):
        """Inputs that the model may take: what forward asks for, then more of what it names."""
        parameters = list(inspect.signature(model.forward).parameters.values())
        names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        needed = [p.name for p in parameters if p.default is p.empty and p.name in names]
        main = getattr(model, "main_input_name", "")
        if isinstance(main, str) and main in names:
            needed = [main, *needed]
        elif not needed:
            needed = [name for name in names if self.make(name)][:1]
        decoder = [name for name in ("decoder_input_ids",) if name in names]
        text = [name for name in ("input_ids", "pixel_values", "bbox", "input_features", "input_values") if name in names]
        for chosen in (needed, needed + decoder, needed + text, needed + text + decoder,
                       [name for name in names if name not in ("inputs_embeds", "hidden_states")]):
            options = {name: made for name in dict.fromkeys(chosen) if (made := self.make(name))}
            for number in range(max(map(len, options.values()), default=0)):
                yield {name: made[min(number, len(made) - 1)] for name, made in options.items()}


def _all_fields(config):
    yield vars(config)
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _all_fields(value)


# one family --------------------------------------------------------------------------------------------------


def build(family: str, classes: list[str]):
    """A small model of a family with inputs that it runs on: model, inputs, seconds of a forward.

    Raises:
        RuntimeError: with what went wrong first.
    """
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    errors: list[str] = []
    for name in classes:
        try:
            cls = getattr(transformers, name)
            kind = cls.config_class or CONFIG_MAPPING[family]
        except (ImportError, AttributeError, KeyError, RuntimeError) as error:
            errors.append(f"{name}: {_line(error)}")
            continue
        same, before, deadline = 0, set(), time.process_time() + LIMIT / 12
        for divisor, image, heads in SIZES:
            now = {re.sub(r"\d+", "", error.partition(":")[2]) for error in errors} - before
            same, before = 0 if now else same + 1, before | now
            if time.process_time() > deadline or same > 2:
                break
            try:
                config = tiny(kind, divisor, image, heads)
                with torch.device("meta"):
                    count = sum(p.numel() for p in cls(config).parameters())
                if count > PARAMETERS:
                    errors.append(f"{name}: still {count} parameters")
                    continue
                torch.manual_seed(0)
                model = _random(cls(config).eval())
            except Exception as error:
                errors.append(f"{name} / {divisor}: {_line(error)}")
                continue
            for inputs in Inputs(model.config).attempts(model):
                try:
                    with torch.no_grad():
                        start = time.process_time()
                        model(**inputs)
                        return model, inputs, time.process_time() - start
                except Exception as error:
                    errors.append(f"{name} / {divisor} on {', '.join(inputs)}: {_line(error)}")
    raise RuntimeError(errors[0] if errors else "no public class", errors)


def _random(model):
    """All parameters are given some noise: what starts as zeros or ones hides what is done with it."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.nan_to_num_(0).clamp_(-3, 3).add_(torch.randn_like(parameter) * 0.05)
    return model


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"


def study(family: str, classes: list[str]) -> dict:
    """What came of one family, as a row of the table."""
    import torch

    import circuitlab as cl
    from circuitlab.diagram.check import look
    from circuitlab.diagram.layout import draw

    torch.set_num_threads(1)
    row: dict = {"family": family, "class": classes[0], "state": "not built"}
    try:
        model, inputs, row["forward"] = build(family, classes)
    except RuntimeError as error:
        row["reason"], row["errors"] = error.args
        return row
    row["class"], row["inputs"] = type(model).__name__, {key: list(value.shape) for key, value in inputs.items()}
    row["state"] = "not traced"
    start = time.process_time()
    try:
        circuit = cl.trace(model, **inputs)
        row["trace"] = time.process_time() - start
        row |= {"device": circuit.device, "ops": len(circuit.ops)}
        row["opaque"] = dict(Counter(op.fn for op in circuit.opaque))
        row["where"] = [f"{op.fn} {op.source}" for op in circuit.opaque][:20]
        row["state"], start = "not verified", time.process_time()
        report = circuit.verify(model, **inputs)
        row["verify"] = time.process_time() - start
        row |= {"held": len(report.held), "failed": len(report.failed), "untestable": len(report.untestable)}
        row["failures"] = [f"{c.kind} {c.wire} in {c.subject} ({c.source}): {c.why}" for c in report.failed][:20]
        row["state"], start = "not drawn", time.process_time()
        scenes = {depth: draw(circuit, depth=depth) for depth in (1, 2, 9)}
        row["draw"] = time.process_time() - start
        for depth, scene in scenes.items():
            circuit.text(depth=depth)
            found = look(scene)
            if not found.ok:
                row.setdefault("faults", []).append(f"depth {depth}: {str(found)[:400]}")
        for depth in (1, 2, 3):
            circuit.save(str(CACHE / f"{family}.{depth}.svg"), depth=depth)
        row["state"] = "verified" if report.ok else "wrong"
        if row.get("faults") and report.ok:
            row["state"] = "faulty drawing"
    except Exception as error:
        row["reason"] = _line(error)
        row["traceback"] = traceback.format_exc()[-3000:]
    return row


# the sweep -----------------------------------------------------------------------------------------------------


def _child(family: str, classes: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
    warnings.simplefilter("ignore")
    log = os.open(CACHE / f"{family}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        row = study(family, classes)
    except BaseException as error:
        row = {"family": family, "class": classes[0], "state": "not built", "reason": _line(error),
               "traceback": traceback.format_exc()[-3000:]}
    (CACHE / f"{family}.json").write_text(json.dumps(row, indent=1))


def sweep(chosen: dict[str, list[str]], jobs: int) -> None:
    """Study families, each in a process of its own with a time limit, several at once."""
    context = multiprocessing.get_context("fork")
    queue, running = list(chosen.items()), []
    while queue or running:
        while queue and len(running) < jobs:
            family, classes = queue.pop(0)
            process = context.Process(target=_child, args=(family, classes))
            process.start()
            running.append((family, classes, process, time.monotonic()))
        time.sleep(0.05)
        for item in list(running):
            family, classes, process, start = item
            late = time.monotonic() - start > 8 * LIMIT
            if process.is_alive() and not late:
                continue
            if late:
                process.kill()
            process.join()
            running.remove(item)
            path = CACHE / f"{family}.json"
            if not path.exists():
                reason = f"took over {LIMIT} s" if late or process.exitcode == -signal.SIGXCPU else f"the process ended with {process.exitcode}"
                row = {"family": family, "class": classes[0], "state": "stopped", "reason": reason}
                path.write_text(json.dumps(row))
            row = json.loads(path.read_text())
            print(f"{len(queue):4} {time.monotonic() - start:6.1f} s  {family:32} {row['state']:14} "
                  f"{row.get('reason', '')[:120]} {row.get('opaque') or ''}", flush=True)


def table(rows: list[dict], missing: list[str]) -> str:
    """The table for people."""
    states = Counter(row["state"] for row in rows)
    ran = [row for row in rows if "ops" in row]
    ops, opaque = sum(row["ops"] for row in ran), sum(sum(row["opaque"].values()) for row in ran)
    import transformers

    lines = [
        "# Families of transformers",
        "",
        "Each family of [transformers](https://github.com/huggingface/transformers) "
        f"{transformers.__version__} is built from its own default configuration, shrunk by what its fields are called "
        "and with random weights, then traced, verified on numbers and drawn. `make zoo` does this anew; it is no part "
        "of `make test`.",
        "",
        f"Of {len(rows)} families studied, " + ", ".join(f"{count} {state}" for state, count in states.most_common()) + ". "
        f"{opaque} of {ops} operations are opaque ({opaque / max(ops, 1):.2%}). Seconds are of processor time: for one forward, and for "
        "tracing, verifying and drawing folded, half open and open, on one core.",
        "",
        "| family | module | state | claims held | failed | operations | opaque | forward s | trace s | verify s | draw s |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in ran:
        share = f"{sum(row['opaque'].values()) / max(row['ops'], 1):.1%}" if row["opaque"] else "0"
        cells = [row["family"], row["class"], row["state"], row.get("held", ""), row.get("failed", ""), row["ops"], share]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("forward", "trace", "verify", "draw")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Not traced", "", "| family | module | state | reason |", "|---|---|---|---|"]
    for row in rows:
        if "ops" not in row:
            reason = str(row.get("reason", "")).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {row['family']} | {row['class']} | {row['state']} | {reason} |")
    if missing:
        lines += ["", f"## Not studied yet ({len(missing)})", "", ", ".join(missing)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--again", default="", help="states (a pattern) of families to study again")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    CACHE.mkdir(exist_ok=True)
    import torch
    import transformers

    import circuitlab.diagram.layout
    import circuitlab.trace.verify  # noqa: F401  before the processes are forked

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.LlamaForCausalLM, transformers.ViTModel, transformers.Wav2Vec2Model  # noqa: B018  imported before as well
    every = families()
    chosen = {family: every[family] for family in given.only.split(",") if family in every} if given.only else dict(every)
    for family in list(chosen):
        path = CACHE / f"{family}.json"
        if given.only or given.table:
            continue
        if path.exists() and not (given.again and re.search(given.again, json.loads(path.read_text())["state"])):
            del chosen[family]
    if not given.table:
        for family in chosen:
            (CACHE / f"{family}.json").unlink(missing_ok=True)
        sweep(chosen, given.jobs)
    rows = [json.loads(path.read_text()) for family in every if (path := CACHE / f"{family}.json").exists()]
    if not given.only:
        TABLE.write_text(table(rows, [family for family in every if not (CACHE / f"{family}.json").exists()]))
    print(Counter(row["state"] for row in rows).most_common())


if __name__ == "__main__":
    sys.exit(main())
