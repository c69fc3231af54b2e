"""Random programs for the simulator: what a driver, its tasks and its actors do, as plain data.

A program is a table of functions; each function is a list of operations on registers. The simulated processes execute it through the production
machines (``nbray.testing.clients``), the oracle serially (``nbray.testing.oracle``). Values are digests: of the function's name, of its arguments and of all that it
has got, so two runs that compute the same have equal digests, and a value that went astray shows.

Registers hold refs ("r…"), values ("v…") or actor handles ("a…"). No program can wait for itself: refs are passed downwards only, actor methods call only
functions that use no actors, and only leaves ask for scarce resources.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

DEP, MENTION, VALUE, HANDLE = "dep", "mention", "value", "handle"
"""Kinds of parameters: the value of a ref, the ref itself, a plain value, an actor handle."""

Operation = tuple[Any, ...]


@dataclass
class Function:
    """A function of the program, or a method. ``returns``: bytes of each return value (of each item of a generator when ``stream``).

    ``raises``: how many first attempts raise (-1: all). ``contains``: registers whose refs its first return value contains.
    """

    name: str
    params: list[str]
    body: list[Operation]
    returns: list[int]
    stream: bool = False
    raises: int = 0
    contains: list[str] = field(default_factory=list)
    seconds: float = 0.0001
    stubborn: bool = False
    max_retries: int = 3
    retry_exceptions: bool = False
    max_calls: int = 0
    priority: int = 0
    backpressure: int = 0
    resources: dict[str, int] = field(default_factory=lambda: {"CPU": 10_000})
    actors: bool = False
    """Whether it uses actors."""


@dataclass
class ActorClass:
    """``methods``: names of functions."""

    name: str
    constructor: str
    methods: list[str]
    mode: str
    max_restarts: int
    max_task_retries: int
    max_concurrency: int


@dataclass
class Features:
    """What the programs of a run may contain; drawn per seed so that a failure is found in its plainest surroundings too."""

    large: bool = False
    actors: bool = False
    streams: bool = False
    cancels: bool = False
    frees: bool = False
    kills: bool = False
    raises: bool = False
    timeouts: bool = False


@dataclass
class Program:
    """``mains``: what each driver does."""

    functions: dict[str, Function]
    classes: dict[str, ActorClass]
    mains: list[list[Operation]]
    features: Features


class _Author:
    """Writes one body: keeps track of which registers hold what."""

    def __init__(self, random: Random, features: Features) -> None:
        self.random = random
        self.features = features
        self.body: list[Operation] = []
        self.refs: list[str] = []
        self.values: list[str] = []
        self.handles: list[tuple[str, ActorClass]] = []
        self._count = 0

    def name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def size(self) -> int:
        if self.features.large and self.random.random() < 0.4:
            return self.random.choice([600, 3000, 9000, 20000, 50000])
        return self.random.randint(16, 200)

    def arguments(self, params: list[str]) -> list[str] | None:
        """Registers for these parameters; None when there are none that fit."""
        chosen = []
        for kind in params:
            if kind in (DEP, MENTION):
                if not self.refs:
                    self.put()
                chosen.append(self.ref())
            elif kind == HANDLE:
                if not self.handles:
                    return None
                chosen.append(self.random.choice(self.handles)[0])
            else:
                chosen.append(
                    self.random.choice(self.values)
                    if self.values and self.random.random() < 0.5
                    else f"={self.random.randint(0, 999)}"
                )
        return chosen

    def ref(self) -> str:
        """One of the refs, rather one of the last."""
        return self.random.choice(self.refs[-3:] if self.random.random() < 0.5 else self.refs)

    def put(self) -> None:
        register = self.name("r")
        contained = [self.random.choice(self.refs)] if self.refs and self.random.random() < 0.3 else []
        self.body.append(("put", register, self.size(), contained))
        self.refs.append(register)

    def call(self, function: Function) -> None:
        args = self.arguments(function.params)
        if args is None:
            return
        if function.stream:
            register = self.name("r")
            taken = (
                len(function.returns) + 1
                if self.random.random() < 0.6
                else self.random.randint(0, len(function.returns))
            )
            between = (
                [self.random.choice(self.refs) for _ in range(self.random.choice([0, 0, 1, 3]))]
                if self.refs
                else []
            )
            self.body.append(("stream", register, function.name, args, taken, between))
            return
        registers = [self.name("r") for _ in function.returns]
        self.body.append(("call", registers, function.name, args))
        self.refs += registers

    def get(self, count: int = 1) -> None:
        if not self.refs:
            return
        chosen = [self.random.choice(self.refs) for _ in range(count)]
        registers = [self.name("v") for _ in chosen]
        timeout = (
            self.random.choice([0.0, 0.0005, 0.01])
            if self.features.timeouts and self.random.random() < 0.2
            else None
        )
        hold = self.features.large and self.random.random() < 0.1
        self.body.append(("get", registers, chosen, timeout, hold))
        self.values += registers

    def open(self) -> None:
        if self.values:
            register = self.name("r")
            self.body.append(("open", register, self.random.choice(self.values)))
            self.refs.append(register)
            if self.random.random() < 0.5:
                self.get()

    def wait(self) -> None:
        if self.refs:
            chosen = sorted(set(self.random.choices(self.refs, k=self.random.randint(1, 5))))
            self.body.append(("wait", chosen, self.random.randint(1, len(chosen))))

    def drop(self) -> None:
        if len(self.refs) > 1:
            register = self.refs.pop(self.random.randrange(len(self.refs)))
            self.body.append(("drop", register))

    def create(self, kind: ActorClass, functions: dict[str, Function]) -> None:
        args = self.arguments(functions[kind.constructor].params)
        if args is None:
            return
        register = self.name("a")
        self.body.append(("actor", register, kind.name, args))
        self.handles.append((register, kind))

    def method(self, functions: dict[str, Function]) -> None:
        if not self.handles:
            return
        register, kind = self.random.choice(self.handles)
        method = functions[self.random.choice(kind.methods)]
        args = self.arguments(method.params)
        if args is not None:
            registers = [self.name("r") for _ in method.returns]
            self.body.append(("method", registers, register, method.name, args))
            self.refs += registers


def random_program(random: Random, features: Features, drivers: int) -> Program:
    """A program for this many drivers."""
    functions: dict[str, Function] = {}
    classes: dict[str, ActorClass] = {}
    levels: list[list[Function]] = []
    for level in range(3):
        made = [_function(random, features, f"f{level}{chr(97 + i)}", levels, functions) for i in range(3)]
        if features.streams:
            made.append(_generator(random, features, f"g{level}", functions))
        levels.append(made)
    plain = [f for made in levels[:2] for f in made]
    if features.actors:
        for index in range(2):
            kind = _actor_class(random, features, f"A{index}", plain, functions)
            classes[kind.name] = kind
            user = _Author(random, features)
            user.handles.append(("arg0", kind))
            for _ in range(random.randint(1, 3)):
                user.method(functions)
            user.get()
            name = f"u{index}"
            functions[name] = Function(name, [HANDLE], user.body, [user.size()], actors=True)
            levels[2].append(functions[name])
    mains = [_main(random, features, levels, classes, functions) for _ in range(drivers)]
    return Program(functions, classes, mains, features)


def _seconds(random: Random) -> float:
    return random.choice([0.00002, 0.0001, 0.0003, 0.002, 0.03])


def _function(
    random: Random, features: Features, name: str, below: list[list[Function]], functions: dict[str, Function]
) -> Function:
    author = _Author(random, features)
    params = [random.choice([DEP, MENTION, VALUE]) for _ in range(random.choice([0, 0, 1, 1, 2, 3]))]
    for index, kind in enumerate(params):
        if kind == MENTION:
            author.refs.append(f"arg{index}")
        else:
            author.values.append(f"arg{index}")
    if below:
        for _ in range(random.randint(0, 5)):
            what = random.random()
            if what < 0.45:
                author.call(random.choice(below[-1]))
            elif what < 0.55:
                author.put()
            elif what < 0.8:
                author.get(random.randint(1, 2))
            elif what < 0.88:
                author.open()
            elif what < 0.94:
                author.wait()
            else:
                author.drop()
    elif author.refs and random.random() < 0.5:
        author.get()
    function = Function(
        name,
        params,
        author.body,
        [author.size() for _ in range(random.choice([1, 1, 1, 1, 2, 3]))],
        seconds=_seconds(random),
    )
    if author.refs and random.random() < 0.5:
        function.contains = [random.choice(author.refs)]
    if features.raises and random.random() < 0.25:
        function.raises = random.choice([-1, 1, 2])
        function.retry_exceptions = function.raises > 0 or random.random() < 0.3
    function.max_retries = random.choice([0, 1, 3, 3, 3])
    function.max_calls = random.choice([0, 0, 0, 0, 0, 1, 3])
    function.priority = random.choice([0, 0, 0, 1, 5])
    function.stubborn = random.random() < 0.2
    # Who waits must hold nothing that others need: that would be a circle.
    if not author.body and random.random() < 0.2:
        function.resources = random.choice([{"CPU": 5_000}, {"CPU": 10_000, "X": 10_000}, {"X": 5_000}])
    functions[name] = function
    return function


def _generator(random: Random, features: Features, name: str, functions: dict[str, Function]) -> Function:
    author = _Author(random, features)
    items = [author.size() for _ in range(random.randint(0, 6))]
    function = Function(
        name, random.choice([[], [DEP], [VALUE]]), [], items, stream=True, seconds=_seconds(random)
    )
    function.backpressure = random.choice([0, 0, 1, 2])
    if features.raises and random.random() < 0.3:
        function.raises = -1
    functions[name] = function
    return function


def _actor_class(
    random: Random, features: Features, name: str, plain: list[Function], functions: dict[str, Function]
) -> ActorClass:
    mode = random.choice(["serial", "serial", "threaded"])
    constructor = Function(
        f"{name}.__init__", random.choice([[], [VALUE], [DEP]]), [], [16], seconds=_seconds(random)
    )
    constructor.resources = random.choice([{}, {"CPU": 10_000}])
    if features.raises and random.random() < 0.15:
        constructor.raises = -1
    functions[constructor.name] = constructor
    retries = random.choice([0, 0, 2, -1])
    methods = []
    for index in range(2):
        author = _Author(random, features)
        params = [random.choice([DEP, VALUE]) for _ in range(random.choice([0, 0, 1, 2]))]
        if random.random() < 0.4:
            callee = random.choice(plain)
            author.call(callee)
            author.get()
        method = Function(
            f"{name}.m{index}",
            params,
            author.body,
            [author.size()],
            seconds=_seconds(random),
            max_retries=retries,
        )
        if features.raises and random.random() < 0.2:
            method.raises = -1
        functions[method.name] = method
        methods.append(method.name)
    return ActorClass(
        name,
        constructor.name,
        methods,
        mode,
        random.choice([0, 0, 1, 3, -1]),
        retries,
        random.randint(2, 4) if mode != "serial" else 1,
    )


def _main(
    random: Random,
    features: Features,
    levels: list[list[Function]],
    classes: dict[str, ActorClass],
    functions: dict[str, Function],
) -> list[Operation]:
    author = _Author(random, features)
    everything = [f for made in levels for f in made]
    for _ in range(random.randint(8, 30)):
        what = random.random()
        if what < 0.05:
            # Short and long ones mixed: what was dispatched ahead is taken back.
            quick = [f for f in levels[0] if not f.stream]
            for _ in range(random.randint(5, 30)):
                author.call(random.choice(quick))
        elif what < 0.40:
            function = random.choice(everything)
            for _ in range(random.choice([1, 1, 1, 2, 12])):
                author.call(function)
        elif what < 0.47:
            author.put()
        elif what < 0.62:
            author.get(random.randint(1, 4))
        elif what < 0.67:
            author.open()
        elif what < 0.72:
            author.wait()
        elif what < 0.78:
            author.drop()
        elif what < 0.80:
            author.body.append(("sleep", random.choice([0.0001, 0.005, 0.2])))
        elif what < 0.92 and classes:
            if author.handles and random.random() < 0.75:
                for _ in range(random.choice([1, 2, 5])):
                    author.method(functions)
            else:
                author.create(random.choice(list(classes.values())), functions)
        elif what < 0.95 and features.cancels and author.refs:
            author.body.append(
                ("cancel", random.choice(author.refs), random.random() < 0.3, random.random() < 0.7)
            )
        elif what < 0.97 and features.frees and author.refs:
            author.body.append(("free", random.choice(author.refs)))
        elif features.kills and author.handles:
            author.body.append(("kill", random.choice(author.handles)[0], random.random() < 0.5))
    for register in author.refs:
        if random.random() < 0.7:
            author.body.append(("get", [author.name("v")], [register], None, False))
    return author.body
