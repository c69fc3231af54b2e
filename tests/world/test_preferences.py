"""How the notebook wants its libraries holds in tasks; and what a cell sets for itself is not left to the next."""

from __future__ import annotations

import decimal
import importlib.util
import locale
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nbray.api import context
from nbray.api.functions import pickle_alone
from nbray.preferences import LIBRARIES, Collector, Preferences


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    """What a test sets here is set back."""
    kept = {
        name: library.read(sys.modules[name]) for name, library in LIBRARIES.items() if name in sys.modules
    }
    zone = os.environ.get("TZ")
    handlers = logging.root.handlers[:]
    with warnings.catch_warnings():
        yield
    logging.root.handlers[:] = handlers
    for name, options in kept.items():
        if name not in ("warnings", "logging"):
            LIBRARIES[name].write(sys.modules[name], options)
    logging.root.setLevel(kept["logging"][""])
    if zone is None:
        os.environ.pop("TZ", None)
    else:
        os.environ["TZ"] = zone
    time.tzset()


def next_cell() -> None:
    context.require().epoch += 1


def told() -> dict[str, bytes]:
    return Collector().collect(pickle_alone)


def in_task(nbray: Any, source: str) -> Any:
    """What ``look()`` of ``source`` returns in a task of the next cell."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    next_cell()
    return nbray.get(nbray.remote(names["look"]).remote(), timeout=60)


def test_print_options_of_numpy_and_pandas(shared_cluster: Any) -> None:
    look = "def look():\n  import numpy as np, pandas as pd\n  return repr(np.array([1/3])), pd.get_option('display.max_rows'), pd.get_option('display.precision'), np.geterr()['divide']"
    assert in_task(shared_cluster, look) == ("array([0.33333333])", 60, 6, "warn")
    np.set_printoptions(precision=3)
    np.seterr(divide="raise")
    pd.set_option("display.max_rows", 7)
    assert in_task(shared_cluster, look) == ("array([0.333])", 7, 6, "raise")
    np.set_printoptions(precision=8)
    np.seterr(divide="warn")
    pd.reset_option("display.max_rows")
    assert in_task(shared_cluster, look) == ("array([0.33333333])", 60, 6, "warn")


def test_warning_filters(shared_cluster: Any) -> None:
    look = (
        "def look():\n  import warnings\n  with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.warn('a word', UserWarning)\n    warnings.warn('other', RuntimeWarning)\n  return [str(each.message) for each in caught]"
    )
    warnings.resetwarnings()
    warnings.filterwarnings("ignore", message="a wo", category=UserWarning)
    assert in_task(shared_cluster, look) == ["other"]
    warnings.simplefilter("ignore")
    assert in_task(shared_cluster, look) == []
    warnings.resetwarnings()
    warnings.simplefilter("always")
    assert in_task(shared_cluster, look) == ["a word", "other"]
    warnings.simplefilter("error", category=pd.errors.PerformanceWarning)
    raises = "def look():\n  import pandas as pd, warnings\n  try: warnings.warn('slow', pd.errors.PerformanceWarning)\n  except pd.errors.PerformanceWarning: return 'raised'"
    assert in_task(shared_cluster, raises) == "raised"


def test_levels_and_handlers_of_loggers(shared_cluster: Any, capfd: pytest.CaptureFixture[str]) -> None:
    look = "def look():\n  import logging\n  logging.getLogger('mine.part').info('said')\n  return logging.getLogger('mine.part').getEffectiveLevel(), logging.root.level, logging.root.manager.disable"
    assert in_task(shared_cluster, look)[0] == logging.root.level
    logging.getLogger("mine").setLevel(logging.DEBUG)
    logging.root.setLevel(logging.ERROR)
    assert in_task(shared_cluster, look) == (logging.DEBUG, logging.ERROR, 0)
    logging.getLogger("mine").setLevel(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    assert in_task(shared_cluster, look) == (logging.WARNING, logging.WARNING, 0)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("<%(levelname)s %(message)s>"))
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO)
    look = "def look():\n  import logging, io, sys\n  kept, sys.stderr = sys.stderr, io.StringIO()\n  logging.getLogger('x').info('said')\n  text, sys.stderr = sys.stderr.getvalue(), kept\n  return text"
    assert in_task(shared_cluster, look) == "<INFO said>\n"
    logging.root.removeHandler(handler)
    assert in_task(shared_cluster, look) == ""


def test_the_time_zone(shared_cluster: Any) -> None:
    look = "def look():\n  import time, datetime\n  return time.strftime('%H:%M', time.localtime(0)), datetime.datetime.fromtimestamp(0).hour"
    os.environ["TZ"] = "Asia/Tokyo"
    assert in_task(shared_cluster, look) == ("09:00", 9)
    os.environ["TZ"] = "UTC+3"
    assert in_task(shared_cluster, look) == ("21:00", 21)
    changes = "def look():\n  import os, time\n  os.environ['TZ'] = 'UTC'\n  time.tzset()\n  return time.localtime(0).tm_hour"
    assert in_task(shared_cluster, changes) == 0
    assert in_task(shared_cluster, "def look():\n  import time\n  return time.localtime(0).tm_hour") == 21


def test_locale(shared_cluster: Any) -> None:
    look = "def look():\n  import locale\n  return locale.setlocale(locale.LC_NUMERIC)"
    assert in_task(shared_cluster, look) == "C"
    for name in ("C.UTF-8", "C.utf8", "POSIX", "en_US.UTF-8"):
        try:
            locale.setlocale(locale.LC_NUMERIC, name)
        except locale.Error:
            continue
        if locale.setlocale(locale.LC_NUMERIC) != "C":
            break
    else:
        pytest.skip("this machine has one locale only")
    assert in_task(shared_cluster, look) == locale.setlocale(locale.LC_NUMERIC)
    locale.setlocale(locale.LC_NUMERIC, "C")
    assert in_task(shared_cluster, look) == "C"


def test_decimals_and_recursion(shared_cluster: Any) -> None:
    look = "def look():\n  import decimal, sys\n  return str(decimal.Decimal(1) / 3), sys.getrecursionlimit()"
    decimal.getcontext().prec = 5
    sys.setrecursionlimit(4321)
    assert in_task(shared_cluster, look) == ("0.33333", 4321)
    decimal.getcontext().prec = 28
    assert in_task(shared_cluster, look)[0] == "0." + "3" * 28


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_parameters_of_figures_also_when_a_task_is_the_first_to_import(shared_cluster: Any) -> None:
    import matplotlib as mpl

    look = "def look():\n  import matplotlib as mpl\n  return mpl.rcParams['lines.linewidth'], list(mpl.rcParams['figure.figsize'])"
    loaded = "def look():\n  import sys\n  return 'matplotlib' in sys.modules"
    mpl.rcParams["lines.linewidth"] = 7.0
    assert in_task(shared_cluster, loaded) is False
    assert in_task(shared_cluster, look)[0] == 7.0
    mpl.rcParams["figure.figsize"] = (1, 2)
    mpl.rcParams["lines.linewidth"] = mpl.rcParamsDefault["lines.linewidth"]
    assert in_task(shared_cluster, look) == (mpl.rcParamsDefault["lines.linewidth"], [1.0, 2.0])


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
def test_what_transformers_put_out(shared_cluster: Any) -> None:
    import sklearn

    look = "def look():\n  import sklearn\n  return sklearn.get_config()['transform_output']"
    sklearn.set_config(transform_output="pandas")
    assert in_task(shared_cluster, look) == "pandas"
    sklearn.set_config(transform_output="default")
    assert in_task(shared_cluster, look) == "default"


def test_only_differences_travel() -> None:
    with warnings.catch_warnings():
        warnings.filters[:] = []  # type: ignore[index]
        for entry in reversed(LIBRARIES["warnings"].defaults(warnings)["filters"]):
            warnings.filterwarnings(
                entry[0], category=getattr(__import__("builtins"), entry[2][1]), module=entry[3] or ""
            )
        decimal.getcontext().prec = 9
        blobs = told()
    assert "decimal" in blobs
    assert "numpy" not in blobs
    assert len(blobs["decimal"]) < 100


def test_collecting_pickles_only_what_changed() -> None:
    collector = Collector()
    made: list[Any] = []

    def pickled(value: Any) -> bytes:
        made.append(value)
        return pickle_alone(value)

    pd.set_option("display.max_rows", 8)
    first = collector.collect(pickled)
    assert any(value == {"display.max_rows": 8} for value in made)
    made.clear()
    assert collector.collect(pickled) == first
    assert made == []


def test_options_that_cannot_be_sent_stay() -> None:
    import threading

    lock = threading.Lock()
    np.set_printoptions(formatter={"float": lambda x: str(lock)}, precision=2)
    taken = Preferences()
    blob = told()["numpy"]
    np.set_printoptions(formatter=None, precision=8)
    taken.take_on({"numpy": blob})
    assert np.get_printoptions()["precision"] == 2
    taken.take_on({})
    assert np.get_printoptions()["precision"] == 8


def test_what_a_cell_sets_is_not_left_to_the_next() -> None:
    worker = Preferences()
    pd.set_option("display.max_rows", 9)
    blobs = told()
    pd.reset_option("display.max_rows")
    worker.take_on(blobs)
    assert pd.get_option("display.max_rows") == 9
    pd.set_option("display.max_rows", 10)
    np.set_printoptions(precision=1)
    logging.getLogger("cells.own").setLevel(logging.DEBUG)
    warnings.simplefilter("ignore")
    worker.renew()
    assert pd.get_option("display.max_rows") == 9
    assert np.get_printoptions()["precision"] == 8
    assert logging.getLogger("cells.own").level == logging.NOTSET
    assert warnings.filters[0][0] != "ignore" or warnings.filters[0][1] is not None
    worker.take_on({})
    assert pd.get_option("display.max_rows") == 60


def test_also_where_the_notebook_has_set_nothing() -> None:
    worker = Preferences()
    worker.take_on({})
    before = warnings.filters[:]
    limit = sys.getrecursionlimit()
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(limit + 7)
    decimal.getcontext().prec = 4
    worker.renew()
    assert warnings.filters[:] == before
    assert sys.getrecursionlimit() == limit
    assert decimal.getcontext().prec == 28


def test_a_broken_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIBRARIES["numpy"], "read", lambda module: 1 / 0)
    assert "numpy" not in told()
    worker = Preferences()
    worker.take_on({"numpy": b"no pickle"})
    worker.renew()
    assert np.get_printoptions()["precision"] == 8
