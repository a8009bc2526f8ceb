"""What one run does on the host: config, loop, checkpoints, workdir."""
