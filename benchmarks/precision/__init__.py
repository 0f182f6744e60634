"""How precise edits are: the table of docs/precision.md, the ablation, the probe and sequential edits, cell by cell.

`python benchmarks/precision DATA --out OUT` measures and writes docs/precision.md; see there what is measured.
"""
