"""The classes that a conditional generator draws: their names, and the names of what carries them.

Rules of this file:
- An ensemble's parameter `generator_classes` has the names as a JSON list; the index of a name is the class_index. A
  model without this parameter has no classes.
- The ensemble and its generator step take the class_index as one more input. It is part of a sample's identity.
"""

from __future__ import annotations

from collections.abc import Iterable

GENERATOR_CLASSES = "generator_classes"  # the parameter of an ensemble
CLASS_INDEX = "class_index"  # the input of an ensemble and of its generator step: int32 [1]
MAX_GENERATOR_CLASSES = 1 << 15  # ImageNet-21k has 21,841
_MAX_NAME_CHARACTERS = 200


def check_class_names(names: Iterable[object]) -> tuple[str, ...]:
    """Return the names of all classes of a generator; raises ValueError that names the wrong one."""
    found: dict[str, None] = {}
    for name in names:
        # JSON can escape a lone surrogate, but neither gRPC nor REST can encode it.
        if not isinstance(name, str) or not name or len(name) > _MAX_NAME_CHARACTERS or not name.isprintable():
            raise ValueError(
                f"the name {name!r:.60} of a generator class is not a text of 1 to {_MAX_NAME_CHARACTERS} printable "
                "characters"
            )
        if name in found:
            raise ValueError(f"two generator classes have the name {name!r:.60}")
        found[name] = None
    if len(found) > MAX_GENERATOR_CLASSES:
        raise ValueError(f"a generator has at most {MAX_GENERATOR_CLASSES} classes, not {len(found)}")
    return tuple(found)
