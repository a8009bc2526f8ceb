"""Models outside their runs: read, written, converted, scored.

A model is a card (`card`: what to build, what it was trained on) and variables
(`model`). `opening` reads one from any path, `formats` writes one in the form
that a name's ending asks for, `conversion` does both. Under them: `store`
(Orbax folders), `program` (StableHLO), `files` and `readers` (files of
weights), `pytorch` and `naming` (state dicts), `simkd_parts`, `guess`,
`digests`.
`scoring` evaluates and predicts.

May import `distributed`, `data`, `losses`, `models`, `distillers` and
`kd_jax.storage`.
"""
