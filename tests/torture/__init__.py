"""Attacks: functions that try a number of things and say what they found. `python -m tests.torture` runs them long.

The ordinary tests call the same functions with small numbers.
"""
