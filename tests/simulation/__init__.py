"""The money core on virtual time: many edges, control and their links under one seeded scheduler.

Real: `Book`, `Admission`, `Journal` and `Running` of the edge; `LeaseDesk`, `Bookkeeper`, `Journals`, `Expiry` and the SQLite store
with all its statements, on real files in memory. Modelled: time, the event loop (it never waits), threads (a statement is done
when it is asked for, or a moment later), the link's sockets (order kept per direction, what is under way at a disconnect lost),
processes and their deaths, callers and what their answers cost. A death of the machine, which needs `fsync`, is not simulated.
"""
