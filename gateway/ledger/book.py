"""What this edge may spend: leases, holds on them, and their settlement. In memory, synchronous, integer.

A lease is a resource's running total of what control has granted to this edge (a balance, a key's limit). A hold sets
a part aside before a provider is called; the end of the exchange settles what it cost, once, or releases it. Totals
only: `granted` and `spent` never fall except when an unused part is given back, so that after any lost message the two
sides agree by comparing numbers. All amounts are nanos.
"""

from __future__ import annotations


class LeaseShort(Exception):
    """A hold does not fit: `resource` lacks `missing_nanos` (at least 0, for a resource never leased)."""

    def __init__(self, resource: str, missing_nanos: int) -> None:
        super().__init__(resource)
        self.resource = resource
        self.missing_nanos = missing_nanos


class Lease:
    """One resource as this edge may spend it."""

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

    def release(self) -> None:
        self.settle(0)


class Book:
    """All leases of this edge."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self.lease = self._leases.get  # by resource

    def __repr__(self) -> str:
        return f"<Book leases {len(self._leases)} held {sum(lease.held for lease in self._leases.values())}>"

    def __len__(self) -> int:
        return len(self._leases)

    def hold(self, resources: tuple[str, ...], nanos: int, now: float) -> Hold:
        """Set `nanos` aside on all resources, or on none. Raises LeaseShort."""
        leases = []
        for resource in resources:
            lease = self._leases.get(resource)
            if lease is None:
                raise LeaseShort(resource, nanos)
            if lease.available < nanos:
                raise LeaseShort(resource, nanos - lease.available)
            leases.append(lease)
        for lease in leases:
            lease.used_at = now
        return Hold(resources, tuple(leases), nanos)

    def available(self, resource: str) -> int:
        """Nanos that may be held now; 0 for a resource never leased."""
        lease = self._leases.get(resource)
        return lease.available if lease is not None else 0

    def granted(self, resource: str, nanos: int, now: float) -> None:
        """Control has granted `nanos` more (0: it said yes to nothing, which suffices for what is free)."""
        assert nanos >= 0
        lease = self._leases.get(resource)
        if lease is None:
            lease = self._leases[resource] = Lease()
            lease.used_at = now
        lease.granted += nanos

    def give_back(self, resource: str, keep_nanos: int = 0) -> int:
        """Take everything unused off a lease but for `keep_nanos`, for control to grant elsewhere; how much."""
        lease = self._leases.get(resource)
        if lease is None:
            return 0
        unused = max(0, lease.available - keep_nanos)
        lease.granted -= unused
        return unused

    def forget(self, resource: str) -> int | None:
        """Drop a lease that nobody will ask for again; how much of it was unused. None: it is held, or was never there.

        Only for a resource whose name is never used again: totals that began anew under an old name would contradict control's.
        """
        lease = self._leases.get(resource)
        if lease is None or lease.holds:
            return None
        unused = self.give_back(resource)
        del self._leases[resource]
        return unused

    def idle(self, before: float) -> list[str]:
        """Resources without holds that were not used since `before`."""
        return [resource for resource, lease in self._leases.items() if lease.holds == 0 and lease.used_at < before]

    def standing(self) -> dict[str, int]:
        """Granted nanos by resource: what control must believe after the link was lost."""
        return {resource: lease.granted for resource, lease in self._leases.items()}
