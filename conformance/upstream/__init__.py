"""transformers' tests/ as a package: the files that were fetched, and here beside them the few that the source
distribution lacks. Processes that its tests start import this first, and with it the catalogue."""

import hf_arch  # noqa: F401

from ..fetch import TESTS

__path__.append(str(TESTS))
