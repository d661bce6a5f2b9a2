"""The compile report of ``kernel_proofs.kernel_report``: ``python -m benchmarks.kernel_report``."""

import sys

from kernel_proofs.kernel_report import main

if __name__ == "__main__":
    sys.exit(main())
