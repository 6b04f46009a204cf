"""Attacks: functions that make many attempts and report their findings. `python -m tests.torture` runs them at length.

The ordinary tests call the same functions with small numbers.
"""
