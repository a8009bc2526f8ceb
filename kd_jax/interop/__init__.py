"""Exchange of weights with other frameworks, as plain numpy arrays."""
