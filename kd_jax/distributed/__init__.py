"""Devices and processes: meshes, collectives, start-up and signals."""
