"""The commands of `python -m kd_jax COMMAND`."""
