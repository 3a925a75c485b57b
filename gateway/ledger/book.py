"""What this edge may spend: leases, holds on them, and their settlement. In memory, synchronous, integer.

A lease is a resource's running total of what control has granted to this edge (a balance, a key's limit, a day's free
requests). A hold sets a part aside before a provider is called; the end of the exchange settles what it cost, once, or
releases it. Totals only: `granted` and `spent` never fall except when an unused part is given back, so that after any lost message the two
sides agree by comparing numbers. Amounts are nanos; of quotas and rates they are requests.

A request is counted apart from its credit, in units of its own: a rate's unit is simply spent in the step that holds the
credit, since no request is ever unmade; a quota's is held as well, for it counts only if a provider made something.
"""

from __future__ import annotations


class LeaseShort(Exception):
    """A hold does not fit: `resource` lacks `missing_nanos` (at least 0, for a resource never leased)."""

    def __init__(self, resource: str, missing_nanos: int) -> None:
        super().__init__(resource)
        self.resource = resource
        self.missing_nanos = missing_nanos


class Lease:
    """One resource as this edge may spend it: nanos, or requests."""

    __slots__ = ("granted", "held", "holds", "spent", "used_at")

    def __init__(self) -> None:
        self.granted = 0
        self.spent = 0
        self.held = 0
        self.holds = 0
        self.used_at = 0.0

    @property
    def available(self) -> int:
        return self.granted - self.spent - self.held

    def __repr__(self) -> str:
        return f"<Lease granted {self.granted} spent {self.spent} held {self.held}>"


class Hold:
    """Credit set aside for one exchange, on every resource it draws from: whoever makes it has seen that it fits. Resolved once."""

    __slots__ = ("_leases", "nanos", "resolved", "resources")

    def __init__(self, resources: tuple[str, ...], leases: tuple[Lease, ...], nanos: int) -> None:
        self.resources = resources
        self._leases = leases
        self.nanos = nanos
        self.resolved = False
        for lease in leases:
            lease.held += nanos
            lease.holds += 1

    def settle(self, nanos: int) -> None:
        """Turn the hold into a charge of `nanos` (0: release)."""
        assert not self.resolved, "a hold resolves once"
        assert nanos >= 0
        self.resolved = True
        held = self.nanos
        for lease in self._leases:
            lease.held -= held
            lease.holds -= 1
            lease.spent += nanos
            assert lease.held >= 0

    def most(self, overshoot_nanos: int) -> int:
        """What may be charged at most: the hold, what its leases have beside it, and so much more that a lease is owed."""
        return self.nanos + max(0, min([lease.available for lease in self._leases]) + overshoot_nanos)

    def add(self, other: Hold) -> bool:
        """Make this hold the larger by another, which is resolved by that. False: it draws from elsewhere, and is released."""
        assert not self.resolved
        if other._leases != self._leases:
            other.release()
            return False
        assert not other.resolved
        other.resolved = True
        self.nanos += other.nanos
        for lease in self._leases:
            lease.holds -= 1
        return True

    def release(self) -> None:
        self.settle(0)


class FreeHold(Hold):
    """A hold of no credit at all and of one request of each quota, which is used up only where `served` was set before the end."""

    __slots__ = ("_quotas", "served")

    def __init__(self, resources: tuple[str, ...], leases: tuple[Lease, ...], quotas: tuple[Lease, ...]) -> None:
        super().__init__(resources, leases, 0)
        self._quotas = quotas
        self.served = False
        for lease in quotas:
            lease.held += 1
            lease.holds += 1

    def settle(self, nanos: int) -> None:
        super().settle(nanos)
        for lease in self._quotas:
            lease.held -= 1
            lease.holds -= 1
            lease.spent += self.served
            assert lease.held >= 0


class Book:
    """All leases of this edge."""

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}  # by resource

    def __repr__(self) -> str:
        return f"<Book leases {len(self.leases)} held {sum(lease.held for lease in self.leases.values())}>"

    def __len__(self) -> int:
        return len(self.leases)

    def hold(self, resources: tuple[str, ...], nanos: int, now: float) -> Hold:
        """Set `nanos` aside on all resources, or on none. Raises LeaseShort."""
        return Hold(resources, self._with(resources, nanos, now), nanos)

    def hold_free(self, resources: tuple[str, ...], quota: str | None, rate: Lease | None, now: float) -> FreeHold:
        """Set one request aside of a quota and of a rate (None: not limited), for what costs nothing. Raises LeaseShort.

        The record of the request settles the quota; of a rate nothing is recorded.
        """
        counted = self._with((quota,), 1, now) if quota is not None else ()
        leases = self._with(resources, 0, now)
        return FreeHold(resources if quota is None else (*resources, quota), leases, counted if rate is None else (*counted, rate))

    def _with(self, resources: tuple[str, ...], amount: int, now: float) -> tuple[Lease, ...]:
        leases = []
        for resource in resources:
            lease = self.leases.get(resource)
            if lease is None:
                raise LeaseShort(resource, amount)
            if lease.available < amount:
                raise LeaseShort(resource, amount - lease.available)
            leases.append(lease)
        for lease in leases:
            lease.used_at = now
        return tuple(leases)

    def open(self, resource: str, now: float) -> Lease:
        """The lease of a resource, empty where nothing was granted yet."""
        lease = self.leases.get(resource)
        if lease is None:
            lease = self.leases[resource] = Lease()
            lease.used_at = now
        return lease

    def available(self, resource: str) -> int:
        """What may be held now; 0 for a resource never leased."""
        lease = self.leases.get(resource)
        return lease.available if lease is not None else 0

    def granted(self, resource: str, nanos: int, now: float) -> None:
        """Control has granted `nanos` more (0: it said yes to nothing, which suffices for what is free)."""
        assert nanos >= 0
        self.open(resource, now).granted += nanos

    def give_back(self, resource: str, keep_nanos: int = 0) -> int:
        """Take everything unused off a lease but for `keep_nanos`, for control to grant elsewhere; how much."""
        lease = self.leases.get(resource)
        if lease is None:
            return 0
        unused = max(0, lease.available - keep_nanos)
        lease.granted -= unused
        return unused

    def forget(self, resource: str) -> int | None:
        """Drop a lease that nobody will ask for again; how much of it was unused. None: it is held, or was never there.

        Only for a resource whose name is never used again: totals that began anew under an old name would contradict control's.
        """
        lease = self.leases.get(resource)
        if lease is None or lease.holds:
            return None
        unused = self.give_back(resource)
        del self.leases[resource]
        return unused

    def idle(self, before: float) -> list[str]:
        """Resources without holds that were not used since `before`."""
        return [resource for resource, lease in self.leases.items() if lease.holds == 0 and lease.used_at < before]

    def standing(self) -> dict[str, int]:
        """Granted nanos by resource: what control must believe after the link was lost."""
        return {resource: lease.granted for resource, lease in self.leases.items()}
