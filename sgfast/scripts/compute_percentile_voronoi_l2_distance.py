"""The percentile of Voronoi distances that losses take as a characteristic length: ``sgfast voronoi`` by another name.

python -m sgfast.scripts.compute_percentile_voronoi_l2_distance --model HUB_ID_OR_PATH --percentile 5
"""

import sys

from sgfast.cli.main import main

if __name__ == "__main__":
    main(["voronoi", *sys.argv[1:]])
