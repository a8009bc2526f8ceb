"""Distributed: where devices and processes meet.

- `collectives`: means, sums and gathers over the devices of a mapped axis.
- `devices`: the mesh, placing arrays, mapping a step over devices.
- `processes`: joining processes, and what they have to agree on.
- `launcher`: starting processes on this machine (`--local_processes`).
- `signals`: SIGTERM, SIGINT and SIGHUP.

This room imports only JAX, NumPy and the standard library.
"""
