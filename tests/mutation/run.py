"""`make mutants`: plant small faults in the decisions of the service and its client, and count those that tests notice.

Rules of this file:
- mutmut changes a copy in build/mutants. The environment of this program has no other copy of the two packages, so the
  tests cannot import unchanged code.
- Only unit tests count: they need neither a service nor torch.
- Texts for people are not changed: docstrings, and each string with a space in it. Their presence and the values in
  them are. mutmut itself leaves out what runs at import (constants, class attributes) and decorated functions.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COPY = ROOT / "build" / "mutants"
SERVICE, CLIENT = "service", "clients/python/src"
MUTATED = [
    *(
        f"{SERVICE}/labelmint/core/{name}.py"
        for name in ("calibration", "content", "errors", "policy", "served_model", "task")
    ),
    *(f"{SERVICE}/labelmint/gateway/sampling/{name}.py" for name in ("cache", "lifecycle", "slots")),
    f"{SERVICE}/labelmint/triton/window.py",
    f"{CLIENT}/labelmint_client/policy.py",
]
TESTS = [
    "tests/core",
    "tests/test_errors.py",
    "tests/gateway/sampling",
    "tests/triton/test_window.py",
    "tests/clients/test_policy.py",
]
STATUSES = ("killed", "survived", "no tests", "timeout")


def copied(path: str) -> str:
    """Where the copy has a source file: mutmut wants both packages in one directory."""
    return f"src/{Path(path).relative_to(CLIENT if path.startswith(CLIENT) else SERVICE)}"


def prepare(files: list[str]) -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT / SERVICE, COPY / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / CLIENT / "labelmint_client", COPY / "src" / "labelmint_client")
    shutil.copytree(ROOT / "tests", COPY / "tests", ignore=shutil.ignore_patterns("__pycache__", "data"))
    (COPY / "mutants").mkdir()  # where mutmut runs the tests
    for name in ("model_repository", "protos"):
        (COPY / "mutants" / name).symlink_to(ROOT / name)
    settings = {
        "source_paths": ["src"],
        "only_mutate": [copied(path) for path in files],
        "pytest_add_cli_args": ["-m", "unit"],
        "pytest_add_cli_args_test_selection": TESTS,
        "process_isolation": "forkserver",  # gRPC does not survive a fork after its first call
    }
    lines = [f"{key} = {value!r}\n" for key, value in settings.items()]
    project = (ROOT / "pyproject.toml").read_text()
    (COPY / "pyproject.toml").write_text(f"{project}\n[tool.mutmut]\n{''.join(lines)}")


def main(files: list[str]) -> int:
    if unknown := set(files) - set(MUTATED):
        print(f"not among the mutated files: {', '.join(sorted(unknown))}; known: {', '.join(MUTATED)}")
        return 2
    prepare(files or MUTATED)
    os.chdir(COPY)
    # mutmut reads its settings when it is imported.
    from libcst import SimpleString
    from mutmut.__main__ import _run
    from mutmut.mutation import mutators
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code
    from mutmut.utils.file_utils import walk_mutatable_files

    of_string = mutators.operator_string
    others = [pair for pair in mutators.mutation_operators if pair[1] is not of_string]
    of_name = (SimpleString, lambda node: () if " " in node.value else of_string(node))
    mutators.mutation_operators[:] = [*others, of_name]
    _run([], int(os.environ.get("JOBS") or os.cpu_count() or 1))
    print(f"\n{'file':50}{'mutants':>9}" + "".join(f"{status:>10}" for status in STATUSES) + f"{'score':>8}")
    diffs = []
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        found = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
        count = Counter(found.values())
        score = (count["killed"] + count["timeout"]) / max(1, len(found))
        print(f"{path!s:50}{len(found):>9}" + "".join(f"{count[s]:>10}" for s in STATUSES) + f"{score:>8.1%}")
        alive = [name for name, status in found.items() if status not in ("killed", "timeout")]
        diffs += [f"{name}: {found[name]}\n{get_diff_for_mutant(name, path=path)}" for name in alive]
    print("", *diffs, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
