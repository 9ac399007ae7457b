"""The live diagram: pan, zoom, unfold, select and search in the browser; every choice is a trait here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import anywidget
import traitlets

from circuitlab.circuit import Block, Circuit
from circuitlab.diagram.layout import draw
from circuitlab.display import VIEW_MIME, mimebundle
from circuitlab.errors import CircuitlabError, InputError

_BUNDLE = Path(__file__).parent / "static" / "widget.js"
_REDRAWN_BY = ("circuit", "depth", "opened", "closed", "batch", "width", "overlay", "span", "outputs")


class DiagramWidget(anywidget.AnyWidget):
    """A circuit, to be looked at from all sides. Make it with ``circuit.view()``.

    Attributes:
        circuit: what is drawn; assign another to draw that.
        depth: levels of blocks to unfold.
        opened, closed: names of blocks that are unfolded or folded, whatever the depth.
        selection: name of the selected wire, op or block, "" for none. Observe it, or assign it.
        search: words to look for. found: names of the wires, ops and blocks that hold them.
        theme: "auto" (follow the notebook), "light", "dark" or "print".
        batch: whether the batch wire is drawn.
        width: rows wrap at this many pixels.
        overlay: wire, op or block name -> a number, drawn as a tint from the smallest to the largest.
        span: the numbers of the lightest and the strongest tint; by default the smallest and the largest shown.
        outputs: "main" leaves out families of further outputs, such as caches of every layer; "all" draws them.
        scene: what is on the screen now, as plain data.
    """

    _esm = _BUNDLE if _BUNDLE.exists() else "export default {render({el}){el.textContent='circuitlab was installed without its JavaScript: reinstall it'}}"

    circuit = traitlets.Instance(Circuit)
    depth = traitlets.Int(1, min=0).tag(sync=True)
    deepest = traitlets.Int(1).tag(sync=True)
    opened = traitlets.Tuple().tag(sync=False)
    closed = traitlets.Tuple().tag(sync=False)
    selection = traitlets.Unicode("").tag(sync=True)
    search = traitlets.Unicode("").tag(sync=True)
    found = traitlets.List(traitlets.Unicode()).tag(sync=True)
    theme = traitlets.Enum(["auto", "light", "dark", "print"], default_value="auto").tag(sync=True)
    batch = traitlets.Bool(True)
    width = traitlets.Float(1000.0)
    overlay = traitlets.Dict()
    span = traitlets.Tuple(default_value=None, allow_none=True)
    outputs = traitlets.Enum(["main", "all"], default_value="main")
    scene = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        circuit: Circuit,
        *,
        depth: int = 1,
        open: Iterable[str] = (),
        closed: Iterable[str] = (),
        theme: str = "auto",
        batch: bool = True,
        width: float = 1000.0,
        overlay: Mapping[str, float] | None = None,
        span: tuple[float, float] | None = None,
        outputs: str = "main",
    ) -> None:
        if depth < 0:
            raise InputError(f"depth={depth} is negative; 0 is one solid block")
        self._ready = False
        super().__init__(
            circuit=circuit, depth=depth, opened=tuple(open), closed=tuple(closed), theme=theme, batch=batch,
            width=width, overlay=dict(overlay or {}), span=span, outputs=outputs,
        )
        self._ready = True
        self.on_msg(self._told)
        self.observe(self._redraw, list(_REDRAWN_BY))
        self._redraw()

    def toggle(self, block: str) -> None:
        """Unfold a folded block, or fold an unfolded one."""
        foldable = cast("dict[str, str]", self.scene["foldable"])
        state = foldable.get(block)
        if state is None:
            self.circuit.block(block)
            raise InputError(f"the block {block!r} is not in the drawing, or has nothing to unfold")
        inside = {b.name for b in self.circuit.block(block).blocks()}
        opened, closed = [n for n in self.opened if n not in inside], [n for n in self.closed if n not in inside]
        (opened if state == "closed" else closed).append(block)
        self._ready = False  # both may change, which is one new drawing
        self.opened, self.closed = tuple(opened), tuple(closed)
        self._ready = True
        self._redraw()

    def _told(self, _: Any, content: dict[str, Any], __: Any) -> None:
        block = content.get("toggle")
        if isinstance(block, str) and block in cast("dict[str, str]", self.scene["foldable"]):
            self.toggle(block)  # else the click was on a drawing that has been replaced meanwhile

    def _redraw(self, change: Any = None) -> None:
        if not self._ready:
            return
        if change is not None and change["name"] == "depth":  # the slider says how deep everything is
            self._ready = False
            self.opened, self.closed = (), ()
            self._ready = True
        self.deepest = _deepest(self.circuit.root)
        self.scene = draw(self.circuit, **self._options()).to_dict()
        self._look()

    def _options(self) -> dict[str, Any]:
        """What `draw` takes."""
        return {
            "depth": self.depth, "open": self.opened, "closed": self.closed, "batch": self.batch,
            "width": self.width, "overlay": self.overlay, "span": self.span, "outputs": self.outputs,
        }

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and what is on the screen now for a reader without its kernel."""
        live: Any = super()._repr_mimebundle_(**kwargs)
        data, metadata = live
        return {**data, **mimebundle(self.circuit, mime=VIEW_MIME, **self._options())}, metadata

    def __repr__(self) -> str:
        return f"DiagramWidget({self.circuit!r}, depth={self.depth})"

    @traitlets.observe("search")
    def _look(self, _: Any = None) -> None:
        """What holds the words, and for what is folded away, the block in the drawing that hides it."""
        words = self.search.strip().lower()
        if not words or not self.scene:
            self.found = []
            return
        shown = set(cast("dict[str, Any]", self.scene["notes"]))
        found = [name for name in self.circuit.wires if words in name.lower()]
        found += [w.name for w in self.circuit.wires.values() if words == w.label.lower()]
        self._find_in(self.circuit.root, words, shown, "", found)
        self.found = list(dict.fromkeys(found))

    def _find_in(self, block: Block, words: str, shown: set[str], hider: str, found: list[str]) -> None:
        here = block.name if block.name in shown else hider
        if words in block.name.lower() or words in block.title.lower():
            found += [block.name, here] if here else [block.name]
        for item in block.items:
            if isinstance(item, Block):
                self._find_in(item, words, shown, here, found)
            elif words in item.lower() or any(words in name.lower() for name in self._parameters(item)):
                found += [item] if item in shown or not here else [item, here]

    def _parameters(self, op: str) -> list[str]:
        return [name for name in self.circuit.op(op).inputs if self.circuit.tensor(name).kind == "parameter"]

    @traitlets.validate("selection")
    def _known(self, proposal: Any) -> str:
        name = proposal["value"]
        circuit = self.circuit
        if name and name not in circuit.wires:
            try:
                circuit.op(name)
            except KeyError:
                try:
                    circuit.block(name)
                except CircuitlabError as error:
                    raise traitlets.TraitError(f"there is no wire, op or block {name!r} to select ({error})") from None
        return name


def _deepest(block: Block) -> int:
    return 1 + max((_deepest(item) for item in block.items if isinstance(item, Block)), default=0)
