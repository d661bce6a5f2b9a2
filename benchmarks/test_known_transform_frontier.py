"""The frontier's points: which are best, and that the page shows the measured ones."""

import json

from benchmarks.known_transform_frontier import PLOT, RESULTS, best_points, table


def point(agreement, failure):
    return {"utility": {"next_token_agreement": agreement}, "attack": {"model": {"failure_rate": failure}}}


def test_best_points_are_beaten_by_no_other_in_both_figures():
    points = [point(0.2, 0.1), point(0.8, 0.0), point(0.1, 0.05), point(0.15, 0.5), point(0.2, 0.05), point(0.8, 0.0)]
    assert best_points(points) == [point(0.8, 0.0), point(0.2, 0.1), point(0.15, 0.5)]


def test_the_page_shows_the_measured_points():
    page = PLOT.parents[1] / "known_transform_frontier.md"
    assert table(json.loads(RESULTS.read_text())["points"]) in page.read_text()
