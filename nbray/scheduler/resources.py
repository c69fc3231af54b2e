"""What a node has and what its tasks hold: a ledger in units of 1/10000.

Rules: free amounts are never negative; held + free = total, always; what a task holds is released exactly once. A worker that resumes from a
blocking ``get`` goes on at once even when its CPU was given away meanwhile: the shortfall is *owed* and paid by the next releases, and nothing is
dispatched while anything is owed (protocol section 5).
"""

from __future__ import annotations

from collections.abc import Mapping

UNIT = 10_000
CPU, GPU, MEMORY = "CPU", "GPU", "memory"

Amounts = dict[str, int]


def units(amounts: Mapping[str, float]) -> Amounts:
    """Amounts in ledger units; zero amounts are left out."""
    return {name: round(amount * UNIT) for name, amount in amounts.items() if amount}


def readable(amounts: Mapping[str, int]) -> str:
    """For people: ``{"CPU": 20000, "TPU": 5000}`` is ``2 CPU, 0.5 TPU``."""
    if not amounts:
        return "nothing"
    return ", ".join(f"{_amount(name, value)} {name}" for name, value in amounts.items())


def _amount(name: str, value: int) -> str:
    amount = value / UNIT
    return f"{amount / 2**30:.2f} GiB" if name == MEMORY else f"{amount:g}"


class Ledger:
    """The resources of one node."""

    __slots__ = ("_gpu_free", "free", "owed", "total")

    def __init__(self, total: Mapping[str, int]) -> None:
        self.total: Amounts = dict(total)
        self.free: Amounts = dict(total)
        self.owed = 0
        """CPU units that resumed tasks use beyond what was free."""
        self._gpu_free = [UNIT] * (total.get(GPU, 0) // UNIT)

    def feasible(self, wanted: Mapping[str, int]) -> bool:
        """Whether an idle node could satisfy this."""
        total = self.total
        return all(total.get(name, 0) >= amount for name, amount in wanted.items())

    def fits(self, wanted: Mapping[str, int]) -> bool:
        """Whether this could be acquired now."""
        if self.owed and wanted.get(CPU):
            return False
        free = self.free
        for name, amount in wanted.items():
            if free.get(name, 0) < amount:
                return False
        return GPU not in wanted or self._choose_gpus(wanted[GPU]) is not None

    def acquire(self, wanted: Mapping[str, int]) -> tuple[int, ...]:
        """Take ``wanted``, which must fit; the ids of the GPUs that were assigned."""
        free = self.free
        for name, amount in wanted.items():
            free[name] -= amount
        if GPU not in wanted:
            return ()
        chosen = self._choose_gpus(wanted[GPU])
        assert chosen is not None, "acquire without fits"
        share = min(wanted[GPU], UNIT)
        for gpu in chosen:
            self._gpu_free[gpu] -= share
        return chosen

    def release(
        self, held: Mapping[str, int], gpus: tuple[int, ...] = (), *, cpu_given: bool = False
    ) -> None:
        """Give back what was acquired; ``cpu_given``: its CPU was given back before, by `give_cpu`."""
        free = self.free
        for name, amount in held.items():
            if name == CPU:
                if not cpu_given:
                    self._return_cpu(amount)
            else:
                free[name] += amount
        if gpus:
            share = min(held[GPU], UNIT)
            for gpu in gpus:
                self._gpu_free[gpu] += share

    def give_cpu(self, held: Mapping[str, int]) -> None:
        """The task blocks: its CPU may go to others."""
        self._return_cpu(held.get(CPU, 0))

    def take_cpu(self, held: Mapping[str, int]) -> None:
        """The task resumes: it takes its CPU back, owing what is not free."""
        wanted = held.get(CPU, 0)
        taken = min(wanted, self.free.get(CPU, 0))
        if wanted:
            self.free[CPU] -= taken
            self.owed += wanted - taken

    def _return_cpu(self, amount: int) -> None:
        paid = min(self.owed, amount)
        self.owed -= paid
        if amount:
            self.free[CPU] += amount - paid

    def _choose_gpus(self, amount: int) -> tuple[int, ...] | None:
        if amount >= UNIT:
            whole = [gpu for gpu, left in enumerate(self._gpu_free) if left == UNIT]
            count = amount // UNIT
            return tuple(whole[:count]) if len(whole) >= count else None
        fitting = [(left, gpu) for gpu, left in enumerate(self._gpu_free) if left >= amount]
        return (min(fitting)[1],) if fitting else None

    def check(self, held: list[Amounts]) -> None:
        """Assert the ledger's rule against all that is ``held`` (CPU of blocked tasks left out)."""
        for name, total in self.total.items():
            free = self.free[name]
            used = sum(amounts.get(name, 0) for amounts in held)
            owed = self.owed if name == CPU else 0
            assert free >= 0, f"{name}: free amount {free} is negative"
            assert used - owed + free == total, (
                f"{name}: held {used} - owed {owed} + free {free} is not the total {total}"
            )
