"""What a cell is sent, seen in a real kernel: large values, plans, refusals, changed inputs, the notebook's options."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        assert k.run("%load_ext nbray").error is None
        assert k.run("%cluster start --cpus 2").error is None
        assert k.run("import numpy as np, pandas as pd\nfrom nbray.notebook import stored").error is None
        yield k


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


def said(run: Run) -> str:
    return "\n".join(bundle.get("text/plain", "") for bundle in run.shown())


def inputs(kernel: Kernel) -> list[int]:
    """What the last cell was sent: bytes that the store has now, that it had before, and that were compared."""
    text = ok(kernel.run("sent.stored, sent.reused, sent.compared")).result
    assert text is not None
    return [int(part) for part in text.strip("()").split(",")]


WATCH = """
from nbray.notebook import cell as _cell
_settle = _cell.Prepared.settle
def settle(self):
    global sent
    _settle(self)
    sent = self.inputs
_cell.Prepared.settle = settle
"""


def test_a_large_array_is_sent_once(kernel: Kernel) -> None:
    ok(kernel.run(WATCH + "x = np.ones(2_000_000)"))
    assert ok(kernel.run("%%remote\nfloat(x.sum())")).result == "2000000.0"
    assert inputs(kernel) == [16_000_000, 0, 0]
    assert ok(kernel.run("%%remote\nfloat(x.mean())")).result == "1.0"
    assert inputs(kernel) == [0, 16_000_000, 16_000_000]
    assert ok(kernel.run("x[7] = 3")).error is None
    assert ok(kernel.run("%%remote\nfloat(x[7])")).result == "3.0"
    assert inputs(kernel)[0] == 16_000_000


def test_a_result_is_an_input_without_looking_at_it(kernel: Kernel) -> None:
    ok(kernel.run("%%remote\nimport numpy as np\nmade = np.arange(3_000_000); other = np.zeros(2_000_000)"))
    assert ok(kernel.run("%%remote\nint(made[-1] + other[0])")).result == "2999999"
    assert inputs(kernel) == [0, 40_000_000, 0]
    ok(kernel.run("made[0] = 5"))
    assert ok(kernel.run("%%remote\nint(made[0])")).result == "5"


def test_the_store_lets_go_of_what_the_notebook_has_not_any_more(kernel: Kernel) -> None:
    ok(kernel.run("gone = np.ones(3_000_000); text = 't' * 2_000_000"))
    ok(kernel.run("%%remote\ngone[0], text[0]"))
    before = int(ok(kernel.run("stored.of_this_process().size")).result or "")
    ok(kernel.run("del gone, text"))
    after = int(ok(kernel.run("stored.of_this_process().size")).result or "")
    assert before - after == 26_000_000


def test_the_summary_says_what_looking_for_changes_cost(kernel: Kernel) -> None:
    ok(kernel.run("big = np.ones(40_000_000)"))
    ok(kernel.run("%%remote\nbig[0]"))
    run = ok(kernel.run("%%remote\nimport time; time.sleep(0.6); big[1]"))
    shown = [
        m["content"]["data"]["text/plain"] for m in run.messages if m["msg_type"] == "update_display_data"
    ]
    assert "in 305 MB (reused" in shown[-1]


def test_a_dry_run_runs_nothing(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "import threading\nlimit = 3; guard = {'lock': threading.Lock()}\ndef under(v): return v < limit"
        )
    )
    run = ok(kernel.run("%%remote --dry-run -o kept\nkept = under(2)\nopen('ran', 'w')\nguard"))
    assert run.result is None
    bundle = run.shown()[-1]
    text = bundle["text/plain"]
    assert "limit" in text
    assert "read by under" in text
    assert "under  function" in text
    assert "guard['lock'] is a lock" in text
    assert "comes back: kept" in text
    assert "<table>" in bundle["text/html"]
    assert kernel.run("import os; 'kept' in globals(), os.path.exists('ran')").result == "(False, False)"


def test_refused_before_anything_is_submitted(kernel: Kernel) -> None:
    ok(kernel.run("import threading\nguard = {'lock': threading.Lock()}"))
    run = kernel.run("%%remote\nopen('ran', 'w')\nguard")
    assert run.error == "SerializationError"
    assert "the variable 'guard' (dict, 1 item, " in run.traceback
    assert "guard['lock'] is a lock" in run.traceback
    assert kernel.run("import os; os.path.exists('ran')").result == "False"


def test_changed_inputs_are_named_once(kernel: Kernel) -> None:
    ok(kernel.run("rows = [1]; table = {'a': 1}; frame = pd.DataFrame({'a': [1, 2]})"))
    run = ok(kernel.run("%%remote\nrows.append(2); frame.loc[0, 'a'] = 5; table['a']"))
    assert "changed on the cluster only" in said(run)
    assert "rows" in said(run)
    assert "frame" in said(run)
    assert "table" not in said(run)
    again = ok(kernel.run("%%remote\nrows.append(2); table['b'] = 2"))
    assert "table changed on the cluster only: bind it in the cell (table = table) or return it" in said(
        again
    )
    assert "rows" not in said(again)
    assert "changed" not in said(
        ok(kernel.run("%%remote -q\nframe.loc[0, 'a'] = 6\nfresh = {}; fresh['a'] = 1"))
    )
    assert kernel.run("rows, table, int(frame.a[0])").result == "([1], {'a': 1}, 1)"
    ok(kernel.run("%%remote\nrows.append(2); rows = rows\nframe.loc[0, 'a'] = 7; frame = frame"))
    assert kernel.run("rows, int(frame.a[0])").result == "([1, 2], 7)"


def test_the_notebooks_options_hold_and_a_cells_own_do_not_stay(kernel: Kernel) -> None:
    look = "%%remote\nimport pandas as pd, numpy as np, time\n(pd.get_option('display.max_rows'), repr(np.array([2 / 3])), time.localtime(0).tm_hour)"
    ok(
        kernel.run(
            "import os, time\npd.set_option('display.max_rows', 11); np.set_printoptions(precision=2)\nos.environ['TZ'] = 'Asia/Tokyo'; time.tzset()"
        )
    )
    assert ok(kernel.run(look)).result == "(11, 'array([0.67])', 9)"
    ok(kernel.run("%%remote\npd.set_option('display.max_rows', 5)\nnp.set_printoptions(precision=7)"))
    assert ok(kernel.run(look)).result == "(11, 'array([0.67])', 9)"
    ok(
        kernel.run(
            "pd.reset_option('display.max_rows'); np.set_printoptions(precision=8); del os.environ['TZ']; time.tzset()"
        )
    )
    assert (
        ok(kernel.run(look)).result
        == f"(60, 'array([0.66666667])', {kernel.run('time.localtime(0).tm_hour').result})"
    )


def test_warnings_and_logs_are_those_of_the_notebook(kernel: Kernel) -> None:
    warn = "%%remote\nimport warnings, logging\nwarnings.warn('look out', UserWarning)\nlogging.getLogger('mine').info('a line')"
    assert "look out" in ok(kernel.run(warn)).text("stderr")
    ok(
        kernel.run(
            "import warnings, logging\nwarnings.filterwarnings('ignore', message='look out')\nlogging.basicConfig(level=logging.INFO, format='%(name)s: %(message)s')"
        )
    )
    run = ok(kernel.run(warn))
    assert "look out" not in run.text("stderr")
    assert "mine: a line" in run.text("stderr")


def test_the_table_of_objects_says_whose_copies_they_are(kernel: Kernel) -> None:
    ok(kernel.run("mine = np.full(3_000_000, 2.0); words = 'w' * 3_000_000"))
    ok(kernel.run("%%remote\nmine[0], words[0]"))
    text = ok(kernel.run("frame_of_objects = get_ipython().run_line_magic('cluster', 'objects')\nprint(frame_of_objects.to_string())")).text()  # fmt: skip
    assert any("mine" in line for line in text.splitlines())
    assert any("words" in line for line in text.splitlines())


def test_the_cells_file_is_the_one_that_it_has_here(kernel: Kernel) -> None:
    here = "import sys\nsys._getframe().f_code.co_filename"
    run = ok(kernel.run(f"%%remote\n{here}"))
    cell = f"%%remote\n{here}"
    named = ok(kernel.run(f"get_ipython().compile.get_code_name({cell!r}, {cell!r}, {run.number})"))
    assert run.result == named.result
    inner = ok(kernel.run(f"get_ipython().run_cell_magic('remote', '', {here!r})"))
    assert inner.result != run.result
    failing = kernel.run("%%remote\nfine = 1\n1 / 0")
    assert f"Cell In[{failing.number}], line 3" in failing.traceback
