"""The classes that a conditional generator draws: their names, and the check of a class_index.

Rules of this file:
- An ensemble's parameter `generator_classes` has the names as a JSON list; the index of a name is the class_index. A
  model without this parameter has no classes.
- The ensemble and its generator step take the class_index as one more input. It is part of a sample's identity.
"""

from __future__ import annotations

from collections.abc import Iterable

from labelmint.core.errors import InvalidRequest

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


def check_class_index(class_index: int | None, count: int) -> int | None:
    """Return the class_index if a generator with `count` classes can draw it; raises InvalidRequest.

    None is right only for a generator without classes, whose `count` is 0.
    """
    if count == 0 and class_index is not None:
        raise InvalidRequest(CLASS_INDEX, "this generator has no classes; omit class_index")
    if count and (class_index is None or not 0 <= class_index < count):
        asked = "none was given" if class_index is None else f"not {class_index}"
        raise InvalidRequest(CLASS_INDEX, f"this generator draws classes; give one from 0 to {count - 1}, {asked}")
    return class_index
