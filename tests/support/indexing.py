"""The command line with small row groups and parts, so that an index of a few hundred seeds has several of each."""

import sys

GROUP, PART = 64, 16
_MAIN = f"""
import labelmint.seed_index.layout as layout
layout.ROW_GROUP_SEEDS = {GROUP}
import labelmint.seed_index.writing as writing
writing.PART_SEEDS = {PART}
from labelmint.cli import main
main()
"""
SMALL_PARTS = [sys.executable, "-c", _MAIN]
