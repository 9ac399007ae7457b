"""Which modules of two partitions are the same: across checkpoints (the same neurons) and across layers (other neurons)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitlab.analysis import affinity
from circuitlab.analysis.modularity import Partition
from circuitlab.analysis.results import Result
from circuitlab.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class Flows(Result):
    """How the modules of one partition go over into those of another.

    Attributes:
        flows: (k_a, k_b): the neurons in both modules; across layers the mean affinity between their neurons.
        pairs: (m, 2), the modules matched one to one so that the matched flows are largest, m = min(k_a, k_b).
        ari: adjusted Rand index (1 for the same partition, 0 for chance), nan across layers.
        nmi: normalised mutual information (arithmetic mean), nan across layers.
        wires: the wires of the two partitions.
    """

    flows: Floats
    pairs: NDArray[np.int64]
    ari: float
    nmi: float
    wires: tuple[str, str] = ("", "")

    def to_frame(self) -> Any:
        """One row for each pair of modules with a flow, as a pandas DataFrame: a, b, flow, matched."""
        import pandas as pd

        a, b = np.nonzero(self.flows)
        matched = {(int(x), int(y)) for x, y in self.pairs}
        return pd.DataFrame({
            "a": a, "b": b, "flow": self.flows[a, b], "matched": [(int(x), int(y)) in matched for x, y in zip(a, b, strict=True)],
        })

    def plot(self, **options: Any) -> Any:
        """The flows as a plotly Figure; matched modules have one colour. See `circuitlab.plots.flows`."""
        names = [wire or side for wire, side in zip(self.wires, ("a", "b"), strict=True)]
        k_a, k_b = self.flows.shape
        after = np.arange(k_a, k_a + k_b)
        after[self.pairs[:, 1]] = self.pairs[:, 0]
        return importlib.import_module("circuitlab.plots").flows([self.flows], names, numbers=[np.arange(k_a), after], **options)

    def __repr__(self) -> str:
        same = "" if np.isnan(self.ari) else f"; ARI {self.ari:.3f}, NMI {self.nmi:.3f}"
        return f"Flows from {self.flows.shape[0]} to {self.flows.shape[1]} modules, {len(self.pairs)} matched{same}"


def match_modules(a: Partition, b: Partition, cofiring: Any = None) -> Flows:
    """Match the modules of two partitions one to one (Kuhn, 1955: the Hungarian method on their flows).

    Args:
        a, b: two partitions of the same neurons, as at two checkpoints; or of two wires.
        cofiring: for two wires, how neurons of a go with neurons of b, (n_a, n_b): phi, or |W_out W_in|.

    Raises:
        InputError: partitions of different sizes without `cofiring`, or one that does not fit.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    na, nb = len(a.labels), len(b.labels)
    one = (np.arange(a.k)[:, None] == a.labels).astype(np.float64)
    two = (np.arange(b.k)[:, None] == b.labels).astype(np.float64)
    ari = nmi = float("nan")
    if cofiring is None:
        if na != nb:
            raise InputError(
                f"these partitions are of {na} and of {nb} neurons, so they share none; give cofiring=, ({na}, {nb}), to match "
                "modules of two layers by how their neurons fire together"
            )
        flows = one @ two.T
        ari = float(adjusted_rand_score(a.labels, b.labels))
        nmi = float(normalized_mutual_info_score(a.labels, b.labels))
    else:
        between = np.asarray(affinity.array(cofiring), dtype=np.float64)
        if between.shape != (na, nb) or not np.isfinite(between).all():
            raise InputError(f"cofiring has shape {between.shape} and should be finite, ({na}, {nb}): neurons of a by neurons of b")
        flows = one @ between @ two.T / np.maximum(np.outer(a.sizes, b.sizes), 1)
    rows, columns = linear_sum_assignment(flows, maximize=True)
    return Flows(flows, np.stack([rows, columns], axis=1).astype(np.int64), ari, nmi, (a.wire, b.wire))
