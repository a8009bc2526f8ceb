"""The commands of `python -m kd_jax COMMAND`: thin `main`s, one a file.

A command parses its arguments, calls the rooms below, and prints. It may import
every room.
"""
