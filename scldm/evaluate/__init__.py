"""How good generated cells are: metrics, floor and rivals, marker genes, and the report that shows them.

Reading order: metrics.py (pure functions of two matrices), rivals.py (what a score is compared with), markers.py,
compare.py (all of it for one set of generated cells, as a JSON-ready dict), figures.py and report.py (that dict,
drawn).
"""
