"""`python -m hf_arch` is `hf-arch`."""

import sys

from hf_arch.cli import main

sys.exit(main())
