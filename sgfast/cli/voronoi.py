"""Command ``sgfast voronoi``: the length scale of an embedding table."""

import json

from rich.console import Console
from rich.table import Table

from sgfast.cli.progress import Follower
from sgfast.huggingface.assets import PACKAGED_MODEL, check_model_exists, load_causal_lm
from sgfast.metrics.voronoi import percentile_of, voronoi_l2_distances
from sgfast.utils.devices import find_device

_CONTEXT = (0, 1, 5, 25, 50, 75, 95, 100)


def run_voronoi(*, model: str | None, percentile: float, half: bool, as_json: bool, device: str = "auto") -> None:
    """Print a percentile of the distances, as a table with other percentiles or as JSON. Progress goes to stderr."""
    progress_console, name = Console(stderr=True), model or PACKAGED_MODEL
    on = find_device(device)
    check_model_exists(model)
    progress_console.print(f"loading {name}", highlight=False)
    weight = load_causal_lm(model)[0].get_input_embeddings().weight
    with Follower(progress_console) as follower:
        follower.begin("nearest tokens", weight.shape[0], "tokens")
        distances = voronoi_l2_distances(
            weight.to(on), half, on_progress=lambda done, total: follower.reach(done, total=total)
        )
    value = percentile_of(distances, percentile)
    if as_json:
        result = {
            "model": name,
            "percentile": percentile,
            "half": half,
            "voronoi_l2_distance": value,
            "rows": weight.shape[0],
            "distinct_nonzero_rows": distances.numel(),
        }
        print(json.dumps(result))
        return
    table = Table(title=f"{'half the ' if half else ''}distance to the nearest other embedding", title_justify="left")
    table.add_column("percentile", justify="right")
    table.add_column("L2", justify="right")
    for one in sorted({*_CONTEXT, percentile}):
        style = "bold" if one == percentile else None
        table.add_row(f"{one:g}", f"{percentile_of(distances, one):.6g}", style=style)
    console = Console()
    console.print(table)
    dropped = weight.shape[0] - distances.numel()
    console.print(
        f"{distances.numel()} embeddings of {name} ({dropped} more are zero or equal to another); "
        f"percentile {percentile:g}: {value:.9g}",
        highlight=False,
    )
