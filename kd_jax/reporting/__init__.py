"""What came out of runs: tables, figures, a page, results to keep.

`runs` collects finished runs and groups trials; `statistics`, `tables`,
`figures` and `hparams` show them; `published` has values to compare with;
`analysis` compares students with teachers; `report` writes all of it, with
`html`; `gather` keeps results, `documents` puts their tables into a document.
The package may import `runs` and all rooms below it; only `cli` and `launch.py`
import it.
"""

import importlib.util

_PACKAGES = ("jinja2", "matplotlib", "pandas", "tabulate", "threadpoolctl")


def require_packages() -> None:
  """Raise ImportError, which names the extra, without its packages."""
  missing = [x for x in _PACKAGES if importlib.util.find_spec(x) is None]
  if missing:
    raise ImportError(
      f"a report needs {', '.join(missing)}: pip install 'kd_jax[report]'"
    )
