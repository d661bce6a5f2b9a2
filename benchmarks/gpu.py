"""The GPU programme of ``kernel_proofs.gpu``: ``python -m benchmarks.gpu``."""

import sys

from kernel_proofs.gpu import main

if __name__ == "__main__":
    sys.exit(main())
