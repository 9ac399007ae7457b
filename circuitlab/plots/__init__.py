"""Results as plotly figures. Each function takes a result and gives a ``plotly.graph_objects.Figure``.

Backgrounds are transparent and lines are a grey that reads on white and on black, so that a figure follows the notebook's
theme. Matrices are averaged down to at most `PIXELS` cells a side before they go to the browser.
"""

from circuitlab.plots.charts import bars, matrix
from circuitlab.plots.landscape import layer_paths, path
from circuitlab.plots.matching import match
from circuitlab.plots.modules import (
    expert_curve,
    flows,
    module_at,
    neurons,
    outline,
    partition,
    places,
    timeline,
    triples,
)
from circuitlab.plots.paths import collapse
from circuitlab.plots.style import PIXELS, aggregated, colour
from circuitlab.plots.surfaces import curve, instability, plane, ridge, spectrum, surface
from circuitlab.plots.wires import stitching, width_curve

__all__ = [
    "PIXELS",
    "aggregated",
    "bars",
    "collapse",
    "colour",
    "curve",
    "expert_curve",
    "flows",
    "instability",
    "layer_paths",
    "match",
    "matrix",
    "module_at",
    "neurons",
    "outline",
    "partition",
    "path",
    "places",
    "plane",
    "ridge",
    "spectrum",
    "stitching",
    "surface",
    "timeline",
    "triples",
    "width_curve",
]
