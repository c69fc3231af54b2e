"""Which objects a cell's names share: large values of their own, where that changes nothing for the program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nbray.notebook import kept, transfer
from nbray.notebook.transfer import Packed

BIG = kept.APART // 8


def apart(**names: Any) -> list[str]:
    """The names whose values get an object of their own."""
    namespace = dict(names)
    extra = {"value": namespace.pop("value")} if "value" in namespace else {}

    def pack(wanted: Iterable[str], more: Mapping[str, Any]) -> Packed:
        return transfer.pack(wanted, namespace, extra=more)

    whole = pack(namespace, extra)
    rest, parts = kept.divide(whole, pack, extra)
    back: dict[str, Any] = {}
    for parcel in (rest.parcel, *parts.values()):
        back.update(transfer.unpack(parcel, {}))
    assert back.keys() == names.keys()
    return list(parts)


def test_a_large_value_beside_others() -> None:
    assert apart(large=np.ones(BIG), small=1, text="x") == ["large"]
    assert apart(large=np.ones(BIG), frame=pd.DataFrame({"a": np.arange(2 * BIG)}), small=1) == [
        "large",
        "frame",
    ]


def test_one_name_alone_needs_none() -> None:
    assert apart(large=np.ones(BIG)) == []
    assert apart(large=np.ones(BIG), value=3) == []


def test_small_values_stay_together() -> None:
    assert apart(a=np.ones(100), b=[1, 2], c="x" * 5000) == []


def test_what_is_shared_stays_together() -> None:
    large = np.ones(BIG)
    assert apart(large=large, same=[large]) == []
    assert apart(large=large, value=large, small=1) == []
    label = ["shared"]
    assert apart(one={"data": np.ones(BIG), "label": label}, label=label, other=np.zeros(BIG)) == ["other"]
    one, two = {"data": np.ones(BIG), "label": label}, {"data": np.ones(BIG), "label": label}
    assert apart(one=one, two=two, small=1) == []


def test_equal_constants_are_not_shared() -> None:
    assert apart(one=(np.ones(BIG), "name", 12345), two=(np.zeros(BIG), "name", 12345)) == ["one", "two"]


def test_modules_and_functions_stay() -> None:
    assert apart(np=np, large=np.ones(BIG)) == ["large"]


def test_values_of_many_objects_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LOOKED_AT", 10)
    assert apart(large=[np.ones(BIG), *([i] for i in range(20))], small=1) == []
