"""Classes that travel by value must not come back over their originals.

An instance of a notebook's class carries the class's definition. When it comes back to the notebook, cloudpickle finds the original by its id, but
sets all attributes of the class again, from the pickle: methods then read a frozen copy of the notebook's globals, and class attributes lose what
was assigned to them. Pickles made through `keep_original` leave a class alone in the process that defined it, and update it everywhere else.
"""

from __future__ import annotations

import copyreg
import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

from cloudpickle import cloudpickle

_copies: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes that this process made from pickles."""


def keep_original(reduced: Any) -> Any:
    """What a pickler's ``reducer_override`` should return, given what cloudpickle's would."""
    if type(reduced) is not tuple or len(reduced) != 6 or reduced[5] is not cloudpickle._class_setstate:
        return reduced
    make, args, state, _, _, _ = reduced
    return make_class, (make, args), state, None, None, set_class_state


def make_class(make: Callable[..., type], args: tuple[Any, ...]) -> type:
    """The class of that id in this process, made if there is none; ``args`` end with the id and a spare argument of cloudpickle's."""
    known: type | None = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(args[-2])
    if known is not None:
        return known
    made = make(*args)
    _copies.add(made)
    return made


def _cached_property(function: Callable[[Any], Any], name: str | None) -> functools.cached_property[Any]:
    made = functools.cached_property(function)
    if name is not None:
        # A class that is made from a pickle does not tell its attributes their names.
        made.__set_name__(type(None), name)
    return made


if sys.version_info < (3, 12):
    # It has a lock there, so that no class of a notebook that uses it could be sent.
    copyreg.pickle(functools.cached_property, lambda each: (_cached_property, (each.func, each.attrname)))


def set_class_state(kind: type, state: Any) -> None:
    """Give a copy its attributes."""
    if kind in _copies:
        cloudpickle._class_setstate(kind, state)
