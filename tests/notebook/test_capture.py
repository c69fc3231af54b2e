"""What a cell reads and binds: the rules of the notebook facts as a table."""

from __future__ import annotations

import ast
import symtable
import sys

import pytest

from nbray.notebook.capture import analyse, is_silenced

# source, names read before they are surely bound, names bound
CELLS = [
    # plain reads and binds
    ("y = x", "x", "y"),
    ("x = x + 1", "x", "x"),
    ("x += 1", "x", "x"),
    ("x: int = y", "int y", "x"),
    ("x: int", "int", ""),
    ("y = 1\nprint(y, z)", "print z", "y"),
    ("x.a += 1", "x", ""),
    ("x[i] = v", "x i v", ""),
    ("a, (b, *c) = d", "d", "a b c"),
    ("a = b = c", "c", "a b"),
    ("f'{n!r:>{width}}'", "n width", ""),
    ("print(y := x, y)", "print x", "y"),
    # deletes
    ("del d", "d", ""),
    ("d = 1\ndel d", "", "d"),
    ("d = 1\ndel d\nprint(d)", "print d", "d"),
    ("del a.b, c[i]", "a c i", ""),
    # branches: bound only if every way binds
    ("if c: x = 1\nprint(x)", "c print x", "x"),
    ("if c: x = 1\nelse: x = 2\nprint(x)", "c print", "x"),
    ("if c: x = 1\nelse: raise e\nprint(x)", "c e print", "x"),
    ("x = 1 if c else d\nx", "c d", "x"),
    ("a and (x := 1)\nx", "a x", "x"),
    ("for i in r: x = i\nprint(i, x)", "r print i x", "i x"),
    ("for i in r:\n  x = i\n  print(x, i)", "r print", "i x"),
    ("for i in r:\n  print(x)\n  x = i", "r print x", "i x"),
    ("while True:\n  x = f()\n  if x: break\nprint(x)", "f print", "x"),
    ("while c:\n  x = 1\nprint(x)", "c print x", "x"),
    ("x = 1\nfor i in r:\n  print(x)\n  del x", "r print x", "x i"),
    ("for i in r: pass\nelse: x = 1\nx", "r", "i x"),
    ("with open(p) as fh: x = fh.read()\nx", "open p", "fh x"),
    ("with suppress(E): x = f()\nx", "suppress E f x", "x"),
    ("try: x = f()\nexcept E: x = 1\nx", "f E", "x"),
    ("try: x = f()\nexcept E: pass\nx", "f E x", "x"),
    ("try: x = f()\nexcept E as e: print(e); raise\nx", "f E print", "x e"),
    ("try: x = f()\nfinally: y = 1\nprint(x, y)", "f print", "x y"),
    ("try: import a\nexcept ImportError: a = None\na", "ImportError", "a"),
    ("match v:\n  case Pt(x=xx): r = xx\nr", "v Pt r", "xx r"),
    (
        "match v:\n  case [a, *b]: r = a\n  case {'k': k, **rest}: r = k\n  case _: r = 0\nr",
        "v",
        "a b r k rest",
    ),
    # scopes
    ("[a for a in b if c]", "b c", ""),
    ("[a for a in a]", "a", ""),
    ("[y := a for a in b]\nprint(y)", "b print y", "y"),
    ("{k: v for k, v in z.items() if k in w}", "z w", ""),
    ("sum(x * s for x in xs)", "sum s xs", ""),
    ("[[i + j + o for i in p] for j in q]", "o p q", ""),
    ("lambda a, b=c: a + b + d", "c d", ""),
    ("def f(a, b=k): return a + b + g", "k g", "f"),
    ("def f(a: A) -> B: ...", "A B", "f"),
    ("def f():\n  x = 1\n  def h(): return x + y\n  return h", "y", "f"),
    ("def f():\n  x = 1\n  def h():\n    nonlocal x\n    x += y\n  return h", "y", "f"),
    ("def f(n): return f(n - 1)", "", "f"),
    ("def f(): return g()\ndef g(): return z\nf()", "z", "f g"),
    ("def f(): return g()\nf()\ndef g(): ...", "g", "f g"),
    ("def f():\n  global g\n  g = h\nf()", "h", "g f"),
    ("def f():\n  global g\n  g += 1", "g", "g f"),
    ("def f():\n  import os\n  return os.name, sys.path", "sys", "f"),
    ("def f(*a, k, **kw): return a, k, kw, z", "z", "f"),
    ("async def f():\n  async for x in y: await x", "y", "f"),
    ("class K(Base, metaclass=M):\n  v = w\n  def m(self): return v, z", "Base M w v z", "K"),
    ("class K:\n  v = 1\n  u = v", "", "K"),
    ("class K:\n  v = v", "v", "K"),
    ("class K:\n  if c: v = 1\n  u = v", "c v", "K"),
    ("class K:\n  v = 1\n  u = [v for _ in r]", "v r", "K"),
    ("class K:\n  if c: a = 1\n  del a", "c", "K"),
    ("class K:\n  for v in r: u = 1\n  print(u, v)", "r print u v", "K"),
    ("def f():\n  a = 1\n  class K:\n    a += 1", "a", "f"),
    ("@deco(a)\ndef f(): ...", "deco a", "f"),
    ("class A: ...\nclass B(A): ...", "", "A B"),
    ("def f():\n  try: pass\n  except E as e: print(e)", "E print", "f"),
    # what an import statement binds
    ("import os.path as p; p.join(s)", "s", "p"),
    ("import xml.dom\nxml.dom", "", "xml"),
    ("from m import a as b, c\nb(c, d)", "d", "b c"),
    ("from m import *\nuse(thing)", "use thing", ""),
    # awaiting at the top level
    ("await foo(q)", "foo q", ""),
    ("async with s as t: x = await t.get(u)\nx", "s u", "t x"),
    ("[x async for x in y]", "y", ""),
    # names inside text
    ("get_ipython().system('ls {folder} $name')", "get_ipython folder name", ""),
    ("out = get_ipython().getoutput('cat {files[0]}')", "get_ipython files", "out"),
    ("get_ipython().run_line_magic('time', 'f(x)')", "get_ipython f x", ""),
    ("df.query('a > @limit and b < @top')", "df limit top", ""),
    ("eval('a + b')", "eval a b", ""),
    ("exec('y = a')", "exec a", ""),
]


@pytest.mark.parametrize(("source", "reads", "binds"), CELLS)
def test_reads_and_binds(source: str, reads: str, binds: str) -> None:
    names = analyse(source)
    assert sorted(names.reads) == sorted(reads.split())
    assert sorted(names.binds) == sorted(binds.split())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="syntax of Python 3.12")
@pytest.mark.parametrize(
    ("source", "reads", "binds"),
    [
        ("def f[T: B](x: T) -> list[T]: return z", "B list z", "f"),
        ("class K[T](Base[T]): v: T", "Base", "K"),
        ("type A[T] = dict[T, V]", "dict V", "A"),
    ],
)
def test_type_parameters(source: str, reads: str, binds: str) -> None:
    names = analyse(source)
    assert sorted(names.reads) == sorted(reads.split())
    assert sorted(names.binds) == sorted(binds.split())


@pytest.mark.parametrize("source", [case[0] for case in CELLS if "get_ipython" not in case[0]])
def test_nothing_is_missed_that_symtable_sees(source: str) -> None:
    """Whatever Python itself resolves to the notebook is read or bound by our account."""

    def of(table: symtable.SymbolTable, top: bool) -> set[str]:
        found = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
        return found.union(*(of(child, False) for child in table.get_children()))

    names = analyse(source)
    seen = of(symtable.symtable(source, "<cell>", "exec"), True)
    if sys.version_info >= (3, 12):
        # Comprehensions are inlined there: their own names stand among those of the cell.
        loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.comprehension)]
        seen -= {name.id for loop in loops for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
    assert seen <= set(names.reads) | set(names.binds)


@pytest.mark.parametrize(
    ("source", "deletes"),
    [
        ("x = 1; del x", "x"),
        ("del x[0], y.z", ""),
        ("try: f()\nexcept E as e: pass", "e"),
        ("def f():\n  global g\n  del g\n  h = 1; del h", "g"),
        ("class K:\n  a = 1\n  del a", ""),
    ],
)
def test_names_that_a_cell_deletes(source: str, deletes: str) -> None:
    assert " ".join(analyse(source).deletes) == deletes


def test_a_name_that_is_only_deleted_need_not_be_sent() -> None:
    assert analyse("del d").only_deleted == {"d"}
    assert analyse("print(d)\ndel d").only_deleted == frozenset()
    assert analyse("def f(): return d\ndel d").only_deleted == frozenset()


def test_attribute_chains_that_may_be_submodules() -> None:
    names = analyse("xml.dom.minidom.parse(f)\nimport os.path")
    assert "dom.minidom.parse" in names.submodules["xml"]
    assert names.imports == ("os.path",)


@pytest.mark.parametrize(
    ("source", "blind"), [("eval(code)", 1), ("globals()['a']", 1), ("vars(x)", 0), ("eval('a')", 0)]
)
def test_calls_that_may_read_what_cannot_be_seen(source: str, blind: int) -> None:
    assert len(analyse(source).blind) == blind


def test_the_first_line_of_a_read_is_known() -> None:
    assert analyse("a = 1\nb = a + c\n\nd = c").reads == {"c": 2}


@pytest.mark.parametrize(
    ("source", "silenced"),
    [
        ("f(x);", True),
        ("f(x)", False),
        ("f(x);  # why\n\n", True),
        ("f('a;')", False),
        ("x = [\n1];\n", True),
        ("(", False),
        ("", False),
    ],
)
def test_semicolon_at_the_end(source: str, silenced: bool) -> None:
    assert is_silenced(source) is silenced


def test_a_syntax_error_names_the_cell() -> None:
    with pytest.raises(SyntaxError) as caught:
        analyse("x = (", "Cell In[3]")
    assert caught.value.filename == "Cell In[3]"
