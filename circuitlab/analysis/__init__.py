"""Numbers on torch: what a circuit says of a module's parameters, and what batches say of its wires. No drawing.

What is where; each file says what it is for:

- shared by all: `batches` (as users have them), `measures` and `labels` of them, `results` (to disk and back).
- permuted wires: `symmetry`; `matching` of two models, by `alignment`, `alignment_arrays`, `alignment_activations` and
  `alignment_soft`.
- evaluated models: `states` (models as points), `sweep` (many points) with `bench`, `shards`, `remote` and `checkpoint`;
  `landscape` (the line between two models), `correction`, `collapse`, `curve`, `plane` and `surface` on a `grid`, `ridge` and
  `hessian` by `derivatives`, `instability`.
- cut and stitched wires: `nested`; `places`, `stitch`, `stitching`.
- partitioned wires: `feedforward` says what a hidden wire is, `hidden` finds what makes one, by `maps`, the learned linear maps;
  `neurons` observes them, through `tap`, `rows`, `views` and `sample`.
  `modularity` partitions them by `affinity`, `balanced`, `communities`, `hierarchy`, `spectral` or `interaction` (by `jacobian`), and
  tests that against `null`, `features` or `surrogate`.
- what modules are good for: `experts`, `expert_curve`, `functional`, `prune`, `activity`, `stability`, `flows`, `coupling`, `lift`,
  `triples`, `graph`; all take modules by `membership`.
"""
