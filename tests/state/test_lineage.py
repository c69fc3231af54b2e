"""Which cell made what out of what, and what is stale: the fold, without a notebook."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbray.state import lineage
from nbray.state.lineage import Cell, Lineage


class Notebook:
    """Cells by their id; a source is what they do."""

    def __init__(self) -> None:
        self.lineage = Lineage()
        self.count = 0

    def run(self, cell: str, source: str, reads: str, **bound: bytes | None) -> None:
        self.count += 1
        made = Cell(cell, source, f"In[{self.count}]")
        self.lineage.ran(made, source, self.lineage.inputs(reads.split()), bound, remote=True)

    def causes(self, *names: str) -> dict[str, str]:
        found = {name: self.lineage.stale(name) for name in names}
        return {name: stale.cause for name, stale in found.items() if stale is not None}


def simple() -> Notebook:
    nb = Notebook()
    nb.run("a", "n = 1", "", n=b"1")
    nb.run("b", "m = n", "n", m=b"1")
    nb.run("c", "s = m", "m", s=b"1")
    return nb


def test_a_producer_that_ran_again_with_another_value_makes_stale_what_came_of_it() -> None:
    nb = simple()
    assert nb.causes("n", "m", "s") == {}
    nb.run("a", "n = 2", "", n=b"2")
    assert nb.causes("n", "m", "s") == {"m": "n", "s": "n"}
    text = nb.lineage.stale("s")
    assert text is not None
    assert (
        text.text
        == "s is stale: In[3] made it of what goes back to an earlier n, which In[4] has changed since"
    )
    nb.run("b", "m = n", "n", m=b"2")
    assert nb.causes("n", "m", "s") == {"s": "m"}
    nb.run("c", "s = m", "m", s=b"2")
    assert nb.causes("n", "m", "s") == {}


def test_the_same_value_again_makes_nothing_stale() -> None:
    nb = simple()
    nb.run("a", "n = 1", "", n=b"1")
    nb.run("a", "n = 2 - 1", "", n=b"1")
    assert nb.causes("m", "s") == {}


def test_code_counts_where_values_cannot_be_compared() -> None:
    nb = Notebook()
    nb.run("a", "o = f()", "", o=None)
    nb.run("b", "r = o", "o", r=None)
    nb.run("a", "o = f()", "", o=None)
    assert nb.causes("r") == {}
    nb.run("a", "o = g()", "", o=None)
    assert nb.causes("r") == {"r": "o"}


def test_inputs_count_where_values_cannot_be_compared() -> None:
    nb = Notebook()
    nb.run("z", "k", "", k=b"1")
    nb.run("a", "o = f(k)", "k", o=None)
    nb.run("b", "r = o", "o", r=None)
    nb.run("z", "k", "", k=b"2")
    assert nb.causes("r") == {"r": "k"}
    nb.run("a", "o = f(k)", "k", o=None)
    assert nb.causes("r") == {"r": "o"}


def test_a_name_that_another_cell_binds_is_another_thing() -> None:
    nb = simple()
    nb.run("other", "n = 5", "", n=b"5")
    assert nb.causes("m", "s") == {}


def test_a_cell_that_reads_what_it_binds_is_not_stale_by_itself() -> None:
    nb = Notebook()
    nb.run("a", "x = 1", "", x=b"1")
    nb.run("b", "x = x + 1", "x", x=b"2")
    nb.run("b", "x = x + 1", "x", x=b"3")
    assert nb.causes("x") == {}


def test_deleted_names_are_no_cause() -> None:
    nb = simple()
    nb.lineage.gone(["n"])
    assert nb.causes("m", "s") == {}
    nb.lineage.ran(Cell("d", "del m", "In[9]"), "del m", (), {}, ["m"])
    assert "m" not in nb.lineage.current


def test_a_hint_is_given_once_per_name_and_change() -> None:
    nb = simple()
    nb.run("a", "n = 2", "", n=b"2")
    assert [stale.name for stale in nb.lineage.hints(["m", "s"])] == ["m", "s"]
    assert nb.lineage.hints(["m", "s"]) == []
    nb.run("a", "n = 3", "", n=b"3")
    assert [stale.name for stale in nb.lineage.hints(["m"])] == ["m"]


def test_what_local_cells_made_is_not_told() -> None:
    nb = Notebook()
    nb.run("a", "n = 1", "", n=b"1")
    nb.lineage.ran(Cell("b", "m = n", "In[2]"), "m = n", nb.lineage.inputs(["n"]), {"m": b"1"})
    nb.run("a", "n = 2", "", n=b"2")
    assert nb.causes("m") == {"m": "n"}
    assert nb.lineage.hints(["m"]) == []


def test_source_and_inputs_of_a_version_can_be_asked_for() -> None:
    nb = simple()
    version = nb.lineage.current["m"]
    assert nb.lineage.sources[version.cell.digest] == "m = n"
    read = version.inputs[0]
    made = nb.lineage.version(read.name, read.number)
    assert made is not None
    assert made.cell.title == "In[1]"


def test_it_is_bounded() -> None:
    nb = Notebook()
    for number in range(lineage.MOST_VERSIONS + 10):
        nb.run("a", f"x = {number % 7}", "x", x=str(number).encode())
    assert len(nb.lineage._versions) <= lineage.MOST_VERSIONS
    assert len(nb.lineage.sources) <= 7
    assert nb.lineage.current["x"].number == lineage.MOST_VERSIONS + 10


RUNS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 2), st.sampled_from(["", "a", "b", "a b", "c d"])),
    max_size=30,
)


@given(RUNS)
def test_running_everything_again_in_order_leaves_nothing_stale(runs: list[tuple[str, int, str]]) -> None:
    """Each cell binds the name that it is called; all of them run once more, in an order in which inputs come first."""
    nb = Notebook()
    last: dict[str, tuple[int, str]] = {}
    for cell, value, reads in runs:
        nb.run(cell, f"{cell} = {value}", reads, **{cell: str(value).encode()})
        last[cell] = value, reads
    done: list[str] = []
    while any(
        cell not in done
        and all(read in done or read not in last or read == cell for read in last[cell][1].split())
        for cell in last
    ):
        for cell, (value, reads) in last.items():
            if cell not in done and all(r in done or r not in last or r == cell for r in reads.split()):
                nb.run(cell, f"{cell} = {value}", reads, **{cell: str(value).encode()})
                done.append(cell)
    assert nb.causes(*done) == {}
