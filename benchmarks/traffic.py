"""The traffic count of ``kernel_proofs.traffic``: ``python -m benchmarks.traffic``."""

import sys

from kernel_proofs.traffic import main

if __name__ == "__main__":
    sys.exit(main())
