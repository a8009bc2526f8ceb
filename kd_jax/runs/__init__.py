"""Runs: what one run does on the host.

`train` tells the story of a run. `config` and `limits` fill and check a config,
`components` builds its parts, `programs` its compiled functions, `teachers`
finds or trains its teachers, `initial` its initial weights and earlier stages.
`loop` trains, `evaluator` scores, `journal` writes down, with `checkpoint`,
`writers`, `workdir` and `finished`. `grid` makes several runs. `identity` says
which configs are the same run, `records` what its files hold; `exits`,
`errors`, `logs` and `fingerprint` are for all.

May import every room below: `distributed`, `data`, `models`, `distillers`,
`training`, `interop`. Only this room and `configs` know ConfigDict.
"""
