"""How good generated cells are, beside other methods on the same cells with the same CPU time.

    python -m benchmarks.quality h5ad=cells.h5ad conditions=cell_type,treatment out=runs/quality

Reading order: config.py (what is run), cells.py (the cells, their splits and genes), work.py (rows that resume),
methods/ (one file for each family), judge.py (scores), table.py and figure.py, __main__.py.
"""
