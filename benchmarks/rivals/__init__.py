"""Other servers of the demo's model, for benchmarks/alternatives.py to compare labelmint with."""
