"""The table that ends a session: other times over ours, and a cell left empty rather than guessed."""

from __future__ import annotations

from benchmarks import ratios, results
from benchmarks.groups import groups
from tests.benchmarks import made_up


def _cells(chunks):
    head, *lines = ratios.table(groups(chunks)).splitlines()
    starts = [0, *(head.index(name) for name in ratios.HEADS if name)]
    starts.insert(2, head.index("dtype") + len("bfloat16") + 2)  # of the column without a head
    return [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]


def test_ratios_are_others_over_ours_and_the_best_rival_is_named():
    layer = made_up.chunk(
        [
            made_up.layer(results.OURS, 2.0, extra_bytes=10),
            made_up.layer(results.CPU, 1.0),  # ours too, no rival
            made_up.layer(results.FORMULA, 5.0, extra_bytes=40),
            made_up.layer(results.FORMULA_COMPILED, 1.8),
            made_up.layer(results.RECOMPUTE, 3.0),
            made_up.layer(results.PLAIN, 1.0),  # another function: never the best
            made_up.layer(results.PRODUCTS, 1.5),
        ]
    )
    step = made_up.chunk(
        [
            made_up.step(results.OURS, 1.0, peak_bytes=60),
            made_up.step(results.OFFICIAL, 1.9, peak_bytes=100),
            made_up.step(results.PROBE, 0.25, peak_bytes=20),
        ],
        "step",
    )
    assert _cells([layer, step]) == [
        [
            *("ViT-B/16 fc1, M = 6,304", "bfloat16", "forward + backward", "2.50", "0.90 formula compiled"),
            *("plain linear 0.50, bare products 0.75", "0.25"),
        ],
        [
            *("ViT-B/16, batch 64", "bfloat16", "training step", "1.90", "1.90 official formula"),
            *("linear probe 0.25", "0.60"),
        ],
    ]


def test_what_failed_or_is_missing_is_no_number():
    failed = made_up.chunk([made_up.layer(results.OURS, "OutOfMemoryError: no"), made_up.layer(results.FORMULA, 1.0)])
    alone = made_up.chunk([made_up.launch(results.OURS, 1.0)], "launch")
    assert [row[3:] for row in _cells([failed, alone])] == [["failed", "", "", ""], ["", "", "", ""]]
