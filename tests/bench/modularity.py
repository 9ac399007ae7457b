"""Partitions against the k-means-constrained package, and against their bounds."""

import threading
import time

import numpy as np
from scipy import sparse


def kmeans(neurons, dims, k, iterations, reference):
    """Seconds and inertia of balanced k-means of random unit keys, ours and the reference's: from the same starting means."""
    from circuitlab.analysis import balanced

    rng = np.random.default_rng(0)
    keys = rng.standard_normal((neurons, dims), dtype=np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    start = keys[rng.choice(neurons, k, replace=False)]
    clock = time.perf_counter()
    labels = balanced.kmeans(keys, k, rng, iterations=iterations, start=start)
    ours = time.perf_counter() - clock, balanced.inertia(keys, labels)
    clock = time.perf_counter()
    balanced.assign(balanced.distances(keys, start))
    step = time.perf_counter() - clock
    if not reference:
        return ours, step, None
    from k_means_constrained import KMeansConstrained

    clock = time.perf_counter()
    peer = KMeansConstrained(k, size_min=neurons // k, size_max=neurons // k, init=start, n_init=1, max_iter=iterations).fit(keys)
    seconds = time.perf_counter() - clock
    return ours, step, (seconds / peer.n_iter_, balanced.inertia(keys, peer.labels_.astype(np.int64)), seconds)


def graph(nodes=16384, edges=763_000):
    """A graph of 64 communities, as CSR."""
    rng = np.random.default_rng(0)
    row = rng.integers(nodes, size=edges)
    near = rng.random(edges) < 0.6
    column = np.where(near, row // 256 * 256 + rng.integers(256, size=edges), rng.integers(nodes, size=edges))
    one_way = sparse.coo_array((rng.random(edges), (row, column)), shape=(nodes, nodes)).tocsr()
    both = sparse.csr_array(one_way + one_way.T)
    both.setdiag(0)
    both.eliminate_zeros()
    return both


def extra_memory(run):
    """Bytes that a call takes at its peak, beyond those before."""
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before, peak, done = resident(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak - before


def rows(row):
    """All of them, each told to `row(what, value, bound)`."""
    from circuitlab.analysis import affinity, communities, null

    (seconds, value), _, peer = kmeans(3072, 768, 64, 50, True)
    row("balanced k-means 3072 x 768 into 64, to its end / k-means-constrained", f"{seconds / peer[2]:.2f} ({seconds:.1f} s)", "< 1")
    row("the same: sum of squares / k-means-constrained's", f"{value / peer[1]:.4f}", "≤ 1")
    (_, value), step, peer = kmeans(16384, 4096, 64, 1, True)
    row("one iteration of 16384 x 4096 into 64: k-means-constrained / ours", f"{peer[0] / step:.0f} ({step:.2f} s)", "≥ 20")
    row("the same, with exchanges: sum of squares / k-means-constrained's", f"{value / peer[1]:.4f}", "≤ 1")
    edges = graph()
    communities.leiden(edges[:64, :64], 0)  # networkit takes a while to import
    clock = time.process_time()
    communities.leiden(edges, 0)
    row(f"Leiden, {edges.shape[0]} nodes and {edges.nnz // 2} edges", f"{time.process_time() - clock:.2f} s", "< 1 s")
    f, n = 16384, 2048
    rng = np.random.default_rng(0)
    fires = (rng.random((n, f)) < 0.1).astype(np.float32)
    together = (fires.T @ fires).astype(np.int32)
    firing = together.diagonal().astype(np.float64)
    more = extra_memory(lambda: null.Cofiring(affinity.phi(together, firing, n), firing, n).weights)
    row("memory of the co-firing graph of 16384 neurons, beyond the counts", f"{more / 2**30:.1f} GB", "≤ 3 GB")
