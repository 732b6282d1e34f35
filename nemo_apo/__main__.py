"""``python -m nemo_apo``: the same as the ``nemo-apo`` command."""

import sys

from nemo_apo.cli import main

if __name__ == "__main__":
    sys.exit(main())
