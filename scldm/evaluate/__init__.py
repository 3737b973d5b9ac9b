"""How good generated cells, an autoencoder or an embedding are: pure functions of matrices, and the report.

Reading order, for generated cells: cells.py (sets of cells and their conditions), space.py (where they are compared),
distances.py, neighbours.py, genes.py and two_sample.py (formulas), metrics.py (the table of scores), protocols.py,
intervals.py, baselines.py, scores.py (at every level), memorisation.py, changes.py and response.py, markers.py,
named.py, config.py, beside.py (all scores beside floor, baselines and parts), compare.py (all of it, as a JSON-ready
dict), verdict.py, figures and report.py (that dict, drawn).
For an autoencoder: reconstruction.py. For an embedding: representation.py.
"""

import importlib
from contextlib import suppress

# scikit-learn asks any polars among the modules for its Series, and fails where another thread has half of it imported,
# as that of MLflow may. An import here waits until it is whole. No evaluation needs polars itself.
with suppress(Exception):
    importlib.import_module("polars")
