"""How much neurons belong together: phi and PPMI from exact co-firing counts, and what a user gives as an affinity.

With n positions, firing counts f_i and co-firing counts c_ij, rates p_i = f_i/n:

- **phi**, the correlation of the two firing indicators: (c_ij/n - p_i p_j) / sqrt(p_i (1-p_i) p_j (1-p_j)). Independent
  neurons have phi 0 with variance 1/(n-1), whatever their rates.
- **PPMI**: max(0, log(c_ij n / (f_i f_j))) in nats (Church & Hanks, 1990; Levy & Goldberg, 2014).

Raw counts are not offered: they mostly tell how often neurons fire. A neuron that never fires, or always, co-varies with
none: its row is zero.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from circuitlab.analysis.balanced import blocks
from circuitlab.errors import InputError

Floats = NDArray[np.floating[Any]]
WEIGHTS = ("phi", "ppmi")


def array(value: Any) -> Any:
    """A tensor, array or scipy sparse matrix as numpy array or CSR array."""
    if hasattr(value, "detach"):
        value = value.detach()
        value = value.to_dense() if value.layout != _strided() else value
        value = value.cpu()
        return value.float().numpy() if value.is_floating_point() and value.dtype.itemsize < 4 else value.numpy()
    if sparse.issparse(value):
        return sparse.csr_array(value)
    return np.asarray(value)


def _strided() -> Any:
    import torch

    return torch.strided


# from counts ------------------------------------------------------------------------------------------


def counts(stats: Any) -> tuple[Any, Floats, int]:
    """Co-firing counts (f, f), firing counts (f,) as float64, and the number of positions, checked.

    Raises:
        InputError: no counts, counts that cannot be, or no neuron that fires at times.
    """
    together = getattr(stats, "cofiring", None)
    if together is None:
        raise InputError("these statistics hold no co-firing counts; observe the wire with co-firing, or use method=\"keys\"")
    together, firing, n = array(together), array(stats.firing).astype(np.float64), int(stats.n)
    if together.shape != (len(firing), len(firing)):
        raise InputError(f"co-firing counts of shape {tuple(together.shape)} do not fit {len(firing)} firing counts")
    if n < 2:
        raise InputError(f"co-firing was counted over {n} positions; observe at least some hundred")
    if (firing < 0).any() or (firing > n).any() or not np.array_equal(np.diagonal(together), firing):
        raise InputError(f"these counts cannot be: firing must be between 0 and n={n}, and the diagonal of co-firing")
    if not ((firing > 0) & (firing < n)).any():
        state = "fires at any" if not firing.any() else "is ever silent, or fires at times: each fires always or never,"
        raise InputError(
            f"no neuron {state} of the {n} positions, so there is no co-activation to partition; "
            "check the inputs and the threshold, or use method=\"keys\""
        )
    return together, firing, n


def phi(together: Any, firing: Floats, n: int) -> Floats:
    """Signed correlation of firing indicators, (f, f) float32, zero on the diagonal and for neurons that never vary.

    Worked out in blocks of rows: it takes 4 f² bytes and little more.
    """
    rate = firing / n
    spread = np.sqrt(rate * (1 - rate))
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    out = np.empty(together.shape, dtype=np.float32)
    for rows in blocks(len(firing), 256):
        block = together[rows] / n
        block -= rate[rows, None] * rate
        block *= scale[rows, None]
        block *= scale
        out[rows] = block
    np.clip(out, -1, 1, out=out)
    np.fill_diagonal(out, 0)
    return out


def weigh(correlation: Floats, firing: Floats, n: int, weight: str, out: Floats | None = None) -> Floats:
    """Non-negative weights (f, f) from signed phi: phi itself clipped at 0, or the PPMI of the counts that it stands for."""
    out = np.empty_like(correlation) if out is None else out
    if weight == "phi":
        return np.maximum(correlation, 0, out=out)
    rate = firing / n
    lift = np.sqrt(np.divide(1 - rate, rate, out=np.zeros_like(rate), where=rate > 0)).astype(np.float32)
    for rows in blocks(len(firing)):  # c_ij n / (f_i f_j) = 1 + phi sqrt((1-p_i)/p_i) sqrt((1-p_j)/p_j)
        out[rows] = np.log1p(np.maximum(correlation[rows], 0) * lift[rows, None] * lift)
    return out


def nearest(weights: Floats, neighbours: int) -> sparse.csr_array:
    """The graph in which each node keeps its heaviest edges: CSR (f, f), symmetric; an edge stays if either end keeps it.

    Args:
        weights: (f, f), symmetric, non-negative.
        neighbours: how many edges each node keeps.
    """
    n = len(weights)
    columns: list[NDArray[np.int32]] = []
    values: list[Floats] = []
    for rows in blocks(n, 256):
        top = np.argpartition(-weights[rows], neighbours, axis=1)[:, :neighbours].astype(np.int32)  # a copy: the rest can go
        columns.append(top)
        values.append(np.take_along_axis(weights[rows], top, axis=1))
    data, column = np.concatenate(values).ravel(), np.concatenate(columns).ravel()
    row = np.repeat(np.arange(n), neighbours)
    kept = data > 0
    one_way = sparse.csr_array((data[kept], (row[kept], column[kept])), shape=(n, n))
    return cast("sparse.csr_array", one_way.maximum(one_way.T).tocsr())


# as given ---------------------------------------------------------------------------------------------


def given(value: Any) -> Any:
    """A user's affinity, checked: (n, n) float32 array or float64 CSR array, symmetric, zero on the diagonal.

    Raises:
        InputError: not a square, finite, symmetric matrix, or one without a positive entry.
    """
    try:
        matrix = array(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"an affinity is a symmetric matrix (array, tensor or scipy sparse); this is none: {error}") from None
    is_sparse = sparse.issparse(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0] or matrix.dtype.kind not in "biuf":
        raise InputError(
            f"cl.partition takes the statistics of a wire (cl.observe(...)[wire.name]) or a symmetric affinity matrix; "
            f"this is {type(value).__name__} of shape {tuple(matrix.shape)} and dtype {matrix.dtype}"
        )
    matrix = matrix.astype(np.float64 if is_sparse else np.float32)
    entries = cast("Floats", matrix.data if is_sparse else matrix)
    bad = ~np.isfinite(entries)
    if bad.any():
        where = "" if is_sparse else f", the first at {tuple(int(i) for i in np.argwhere(bad)[0])}"
        raise InputError(f"this affinity has {int(bad.sum())} entries that are not finite{where}; dead neurons may be given as zeros")
    largest = float(np.abs(entries).max()) if entries.size else 0.0
    if is_sparse:
        gap = float(abs(matrix - matrix.T).max())
    else:
        gap = max(float(np.abs(matrix[rows] - matrix[:, rows].T).max()) for rows in blocks(len(matrix)))
    if gap > 1e-5 * largest:
        raise InputError(f"this affinity is not symmetric: entries differ from their mirror by up to {gap:.3g}; give (A + A.T) / 2")
    if is_sparse:
        matrix = sparse.csr_array(matrix - sparse.diags_array(matrix.diagonal()))
        matrix.eliminate_zeros()
        positive = (matrix.data > 0).any()
    else:
        np.fill_diagonal(matrix, 0)
        positive = (matrix > 0).any()
    if not positive:
        raise InputError("this affinity has no positive entry off the diagonal, so nothing belongs together")
    return matrix
