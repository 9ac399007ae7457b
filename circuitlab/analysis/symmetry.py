"""The permutation group of a module's parameters, read off its circuit.

Hidden units have no order: permuting a wire everywhere it sits leaves the function as it is. These permutations are a
group, and it is what makes two trained networks look further apart than they are (Entezari et al., 2022; Ainsworth et
al., *Git Re-Basin*, 2023). Where a wire stands within another everywhere, as the entries of each head do within the
heads, each index of the outer one has a permutation of its own (a wreath product): heads permute as blocks, and inside
each block entries permute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from circuitlab.circuit import Circuit, Wire
from circuitlab.trace.permutable import Part, nesting
from circuitlab.trace.permute import check, permute

Element = dict[str, torch.Tensor]
"""An element of the group: wire name -> permutation, of shape `Symmetry.shape`. Wires that are left out stay."""


class Symmetry:
    """The permutations of a module's parameters that leave its function as it is.

    An element is a dict from wires to indices: entry ``i`` of the new wire is entry ``index[i]`` of the old one. A wire
    within others has an index for each entry of those: ``index[h]`` is that of the *new* head ``h``.

    Attributes:
        circuit: that it was read off.
        wires: the permutable wires by name, in the order that they appear; `Wire.places` tells where each sits.
        within: wire name -> names of the wires that it stands within everywhere, outermost first.
        frozen: the other wires, each with the reason why it cannot be permuted.
    """

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        self.wires: Mapping[str, Wire] = {name: wire for name, wire in circuit.wires.items() if wire.permutable}
        self.frozen: Mapping[str, str] = {name: w.why for name, w in circuit.wires.items() if not w.permutable}
        found = nesting(circuit)
        self.within: Mapping[str, tuple[str, ...]] = {name: found.get(name, ()) for name in self.wires}

    @cached_property
    def actions(self) -> Mapping[str, tuple[tuple[str, int, int, Part], ...]]:
        """Parameter or buffer -> what acts on it: (wire, dimension, factor of it, part of it or None), ..."""
        found: dict[str, list[tuple[str, int, int, Part]]] = {}
        for name, wire in self.wires.items():
            for tensor, dim, factor, part in wire.places:
                found.setdefault(tensor, []).append((name, dim, factor, part))
        return {tensor: tuple(places) for tensor, places in found.items()}

    @property
    def log_order(self) -> float:
        """Natural logarithm of the number of elements."""
        return sum(math.prod(self.shape(name)[:-1]) * math.lgamma(w.size + 1) for name, w in self.wires.items())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a wire's index: the sizes of the wires that it stands within, and its own."""
        return tuple(self.circuit.wires[other].size for other in (*self.within[name], name))

    # elements -----------------------------------------------------------------------------------------

    def identity(self) -> Element:
        """The element that moves nothing."""
        return {name: torch.arange(wire.size, device="cpu").expand(self.shape(name)).clone() for name, wire in self.wires.items()}

    def random(self, seed: int = 0) -> Element:
        """An element drawn uniformly. The same seed gives the same; no global random state is touched."""
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(self.shape(name), generator=generator, dtype=torch.float64, device="cpu").argsort(-1) for name in self.wires}

    def element(self, permutations: Mapping[str, Any]) -> Element:
        """Permutations, some of which may be left out or given once for all indices around, as an element.

        Raises:
            InputError: an unknown or frozen wire, or not a permutation of its size.
        """
        made = self.identity()
        for name, given in permutations.items():
            index = check(self.circuit, self.within, name, given)
            made[name] = index.expand(self.shape(name)).clone()
        return made

    def compose(self, first: Mapping[str, Any], then: Mapping[str, Any]) -> Element:
        """The element that does what two do one after the other."""
        one, two = self.element(first), self.element(then)
        return {name: self._rows(one, two, name).gather(-1, two[name]) for name in self.wires}

    def inverse(self, permutations: Mapping[str, Any]) -> Element:
        """The element that undoes another."""
        one = self.element(permutations)
        back: Element = {}
        for name in sorted(self.wires, key=lambda name: len(self.within[name])):
            back[name] = self._rows(one, back, name).argsort(-1)
        return {name: back[name] for name in self.wires}

    def _rows(self, one: Element, two: Element, name: str) -> torch.Tensor:
        """A wire's permutations in the first element, for the indices around it after the second has moved those."""
        outer = self.within[name]
        if not any(other in two for other in outer):
            return one[name]
        grid = torch.meshgrid(*(torch.arange(self.circuit.wires[other].size, device="cpu") for other in outer), indexing="ij")
        at = dict(zip(outer, grid, strict=True))
        where = [two[o][tuple(at[around] for around in (*self.within[o], o))] if o in two else at[o] for o in outer]
        return one[name][tuple(where)]

    def apply(self, model: torch.nn.Module, permutations: Mapping[str, Any]) -> torch.nn.Module:
        """A copy of a module with an element applied: the same function, other numbers. As `Circuit.permute`.

        Raises:
            InputError: an unknown or frozen wire, or not a permutation of its size.
            VerificationError: another module than the circuit was traced from.
        """
        return permute(self.circuit, model, permutations)

    # for people ---------------------------------------------------------------------------------------

    def to_frame(self) -> Any:
        """All wires as a pandas DataFrame: wire, size, permutable, within, places, why."""
        import pandas as pd

        rows = [
            {"wire": name, "size": wire.size, "permutable": wire.permutable, "within": ", ".join(self.within.get(name, ())),
             "places": ", ".join(dict.fromkeys(place[0] for place in wire.places)), "why": wire.why}
            for name, wire in self.circuit.wires.items()
        ]
        return pd.DataFrame(rows, columns=["wire", "size", "permutable", "within", "places", "why"])

    def __repr__(self) -> str:
        order = f"10^{self.log_order / math.log(10):.0f}" if self.log_order > math.log(1e6) else f"{math.exp(self.log_order):.0f}"
        lines = [f"Symmetry of {self.circuit.title}: {order} permutations of {len(self.wires)} wires that leave the function as it is"]
        for name, wire in self.wires.items():
            tensors = list(dict.fromkeys(place[0] for place in wire.places))
            more = f" and {len(tensors) - 4} more" if len(tensors) > 4 else ""
            inner = f" within {', '.join(self.within[name])}" if self.within[name] else ""
            lines.append(f"  {name} ({wire.size}{inner}): {', '.join(tensors[:4])}{more}")
        lines += [f"  {name} ({self.circuit.wires[name].size}) is frozen: {why}" for name, why in self.frozen.items()]
        return "\n".join(lines)
