"""Other servers of the demo's model, which benchmarks/alternatives.py compares with labelmint."""
