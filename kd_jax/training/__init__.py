"""What is compiled: state, optimiser, loss, step, evaluation and metrics."""
