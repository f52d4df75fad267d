"""Tables, plots and the page, from made-up results whose every number is worked out by hand."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import plots, report, results, tables
from benchmarks.groups import groups
from tests.benchmarks import made_up
from tests.benchmarks.made_up import chunk, launch, layer, step


def cells(table):
    """Return the cells of a Markdown table, by the first cell of each row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0].strip("*"): row[1:] for row in rows}


def three_shapes(device=made_up.GPU):
    """The formula is 2, 4 and 0.5 times as slow as ours, factored 3, 3 and 3 times, plain 0.5, 1 and 2 times."""
    rows = []
    for m, formula, plain in ((197, 2.0, 0.5), (1576, 4.0, 1.0), (6304, 0.5, 2.0)):
        seconds = m * 1e-6
        rows += [
            layer(results.OURS, seconds, m=m, extra_bytes=1_200_000, saved_bytes=1000, saved_x=True),
            layer(results.FORMULA, formula * seconds, m=m, extra_bytes=9_440_000, saved_bytes=m * 1000, saved_x=True),
            layer(results.FACTORED, 3 * seconds, m=m),
            layer(results.PLAIN, plain * seconds, m=m, extra_bytes=0, saved_bytes=0, saved_x=False),
        ]
    return chunk(rows, device=device)


def steps(device=made_up.GPU):
    rows = [
        step(results.OURS, 0.1, peak_bytes=6e9),
        step(results.OFFICIAL, 0.25, peak_bytes=9e9),
        step(results.FULL, 0.08, peak_bytes=12e9),
        step(results.OFFICIAL_COMPILED, "RuntimeError: no"),
    ]
    return chunk(rows, "step", device)


def calls(device=made_up.GPU):
    rows = [launch(results.OURS, 30e-6), launch(results.PLAIN, 12e-6), launch(results.OURS, 20e-6, "no_grad")]
    rows += [launch(results.PLAIN, 5e-6, "no_grad"), launch(results.FORMULA, 45e-6)]
    return chunk(rows, "launch", device)


def test_the_summary_counts_wins_and_shows_losses():
    found = cells(tables.summary(groups([three_shapes()])))
    assert found["compared with"] == ["computes", "forward + backward"]
    # the best of the others: formula 2, factored 3, formula 0.5; cube root of 3
    assert found["best other way to the same function"] == ["the same", "1.44 (0.50 to 3.00), faster in **2 of 3**"]
    assert found["formula"] == ["the same", "1.59 (0.50 to 4.00), faster in **2 of 3**"]  # cube root of 4
    assert found["factored"] == ["the same", "3.00 (3.00 to 3.00), faster in 3 of 3"]
    # another function's lead is no loss; at equal times nobody is faster
    assert found["plain linear"] == ["another function", "1.00 (0.50 to 2.00), faster in 1 of 3"]
    assert results.OURS not in found
    # of one case its ratio says it all
    one = cells(tables.summary(groups([chunk(three_shapes()["results"][-4:])])))
    assert (one["formula"][1], one["factored"][1], one["plain linear"][1]) == ("**0.50**", "3.00", "2.00")
    first = cells(tables.summary(groups([chunk(three_shapes()["results"][:4])])))
    assert (first["formula"][1], first["plain linear"][1]) == ("2.00", "0.50")


def test_losses_list_every_case_that_another_way_wins():
    found = tables.losses(groups([three_shapes()])).splitlines()
    assert found[2:] == ["| ViT-B/16 fc1, M = 6,304 | bfloat16 | forward + backward | formula | 0.50 |"]
    (text,) = [part for part in report._summaries(groups([three_shapes()])) if part.startswith("Ours")]
    assert text == "Ours is the fastest way to the same function in 2 of 3 cases."


def test_every_case_in_ratios_and_on_a_gpu_in_absolute_numbers():
    found = groups([three_shapes()])
    # 6 * 197 * 3072 * 768 flops in 197 µs: 14.2 TFLOP/s
    assert (
        tables.every_case(found)
        .splitlines()[0]
        .startswith("| layer | M | backend | ours, µs | ours, TFLOP/s | formula")
    )
    assert tables.every_case(found).splitlines()[2] == "| fc1 | 197 | triton | 197.0 | 14.2 | 2.00 | 3.00 | 0.50 |"
    # bold: lost to the same function; the plain linear is another
    assert (
        tables.every_case(found).splitlines()[4] == "| fc1 | 6,304 | triton | 6,304.0 | 14.2 | **0.50** | 3.00 | 2.00 |"
    )
    forward = groups([chunk([layer(results.OURS, 1e-3, direction="forward")])])
    # one product of 2 * 6304 * 3072 * 768 flops in 1 ms: 29.7
    assert tables.every_case(forward).splitlines()[2] == "| fc1 | 6,304 | triton | 1,000.0 | 29.7 |"


def test_steps_on_a_gpu_and_on_a_cpu():
    (group,) = groups([steps()])
    found = cells(tables.step(group))
    assert found["method"] == ["computes", "images/s", "ms", "its time / ours", "peak memory, GB", "our peak / its"]
    assert found["rlrr_kernels"] == ["this package", "640", "100.0", "1.00", "6.00", "1.00"]
    assert found["official formula"] == ["the same", "256", "250.0", "2.50", "9.00", "0.67"]
    assert found["full fine-tuning"] == ["another function", "800", "80.0", "0.80", "12.00", "0.50"]
    assert found["official formula compiled"] == ["the same", "", "", "failed", "", ""]
    (group,) = groups([steps("cpu")])
    assert cells(tables.step(group))["official formula"] == ["the same", "2.50", "9.00", "0.67"]


def test_calls_on_a_gpu_and_on_a_cpu():
    found = cells(tables.launch(groups([calls()])))
    assert found["implementation"] == ["computes", "forward", "forward, no graph"]
    assert found["rlrr_kernels"] == ["this package", "30.0 µs, 2.5 x", "20.0 µs, 4.0 x"]
    assert found["formula"] == ["the same", "45.0 µs, 3.8 x", ""]
    assert cells(tables.launch(groups([calls("cpu")])))["rlrr_kernels"] == ["this package", "2.5 x", "4.0 x"]


def ranks():
    """At rank 8 two layers. One was measured at rank 1 too, before rows had a rank; ours loses in the other."""
    rows = [layer(results.OURS, 1.0), layer(results.FORMULA, 3.0), layer(results.HIRA, 2.0), layer(results.PLAIN, 0.5)]
    for row in rows:
        del row["rank"]
    for name, ours, recompute in (("fc1", 2.0, 3.0), ("qkv", 4.0, 3.0)):
        where = {"name": name, "rank": 8}
        rows += [
            layer(results.OURS, ours, extra_bytes=10, **where),
            layer(results.FORMULA, 4.0, extra_bytes=40, **where),
            layer(results.RECOMPUTE, recompute, **where),
            layer(results.HIRAS[8], 16.0, extra_bytes=80, **where),
        ]
    rows += [layer(results.OURS, 1.0, name="fc2"), layer(results.FORMULA, 3.0, name="fc2")]
    return chunk(rows, device="cpu")


def test_ranks_stand_in_a_table_of_their_own_beside_rank_1():
    text, drawn = report.generate([[ranks()]])
    before, _, own = text.partition("### Ranks above 1")
    head, _, *lines = [line for line in own.splitlines() if line.startswith("|")][:7]
    assert head.startswith("| layer | M | r | formula | best other way to the same function | HiRA of this r (PEFT) |")
    assert lines == [
        "| fc1 | 6,304 | 1 | 3.00 | 3.00 (formula) | 2.00 | 0.50 |  |  |",
        "| fc1 | 6,304 | 8 | 2.00 | 1.50 (recompute) | 8.00 |  | 25.0% | 12.5% |",
        "| qkv | 6,304 | 8 | 1.00 | **0.75** (recompute) | 4.00 |  | 25.0% | 12.5% |",
        "| geometric mean |  | 1 | 3.00 | 3.00 | 2.00 | 0.50 |  |  |",
        # the square roots of 2 * 1, 1.5 * 0.75 and 8 * 4
        "| geometric mean |  | 8 | 1.41 | 1.06 | 5.66 |  | 25.0% | 12.5% |",
    ]
    assert "| ViT-B/16 qkv, M = 6,304, r = 8 | bfloat16 | forward + backward | recompute | 0.75 |" in own
    assert "fastest way to the same function in 2 of 2 cases" in before
    assert "fastest way to the same function in 2 of 3 cases" in own
    assert results.HIRAS[8] not in before
    assert "Ranks" not in report.generate([[three_shapes("cpu")]])[0]
    assert drawn["cpu-throughput-ViT-B-16.png"].alt.endswith("fc1, fc2")


def test_failures_are_named_with_their_number():
    rows = [layer(results.FORMULA_MAX, "OutOfMemoryError: 3 | 4 GiB", m=m) for m in (197, 6304)]
    assert tables.failures(groups([chunk(rows)])).splitlines()[2] == (
        "| formula max-autotune | 2 | ViT-B/16 fc1, M = 197 | OutOfMemoryError: 3 \\| 4 GiB |"
    )
    assert tables.failures(groups([three_shapes()])) == ""


def test_the_caption_says_where_when_and_how():
    assert tables.caption(groups([three_shapes()])) == (
        "*NVIDIA H200 (Made-up 9000, 2 cores used); rlrr_kernels 0.0.1, PyTorch 9.9.9; 2020-02-29; "
        "`make made-up CHUNK=layer`*"
    )
    assert tables.caption(groups([three_shapes("cpu")])).startswith("*Made-up 9000, 2 cores used; rlrr_kernels")
    other = [
        chunk([layer(results.OURS, 1.0, m=m)], chunk=f"c{m}", date="2020-03-01", command=f"run {m}") for m in range(4)
    ]
    lines = tables.caption(groups([three_shapes(), *other])).split("  \n")
    assert len(lines) == 2
    assert lines[1].endswith("2020-03-01; 4 commands, `run 0` to `run 3`*")


def test_a_page_of_a_cpu_holds_ratios_and_no_times():
    text, drawn = report.generate([[three_shapes("cpu"), steps("cpu"), calls("cpu")]])
    assert report.NO_GPU in text
    assert report.NO_CPU not in text
    assert text.count("not measured |") == 13
    assert "Incomplete" not in text
    for unit in ("µs", "TFLOP", "images/s |", "| ms |"):
        assert unit not in text.partition("## CPU")[2]
    assert "| **best other way to the same function** | the same | 1.44 (0.50 to 3.00)" in text
    assert sorted(drawn) == ["cpu-memory-ViT-B-16.png", "cpu-step.png", "cpu-throughput-ViT-B-16.png"]
    assert all(f"](benchmarks/{name})" in text for name in drawn)


def test_a_page_of_a_gpu_holds_its_targets():
    text, _ = report.generate([[three_shapes(), steps(), calls()]])
    assert report.NO_CPU in text
    assert report.NO_GPU not in text
    assert (
        "| forward + backward: formula in eager, its time / ours, M = 6,304 | >= 2 | NVIDIA H200 | "
        "0.500 (ViT-B/16 fc1, M = 6,304) | 1 of 8 | **missed** |"
    ) in text
    assert "| 2.500 (ViT-B/16, batch 64) | 1 of 1 | **met** |" in text
    assert "of 60 cases lack a measurement | 3 of 60 | **incomplete** |" in text
    assert "## NVIDIA H200" in text


def test_without_results_the_page_says_what_is_missing():
    text, drawn = report.generate([])
    assert report.NO_GPU in text
    assert report.NO_CPU in text
    assert not drawn
    assert text.count("| no GPU yet |  | 0 of ") == 13


def test_the_page_says_what_is_incomplete():
    text, _ = report.generate([[three_shapes(), steps() | {"complete": False}]])
    assert "- **Incomplete**, of which only a part was measured: `step-made-up`.\n" in text
    assert tables.caveats([three_shapes()]) == ""
    # a run that ended before its first group, and nothing else
    alone, _ = report.generate([[chunk([], complete=False)]])
    assert "Incomplete" in alone


@pytest.fixture
def place(tmp_path):
    """Raw results of one CPU, and a page with text around the markers."""
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "results" / "cpu" / "layer.json").write_text(json.dumps(three_shapes("cpu")))
    (tmp_path / "results" / "cpu" / "choice.json").write_text('{"best": 1}')
    (tmp_path / "page.md").write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    return tmp_path


def run(place, *options):
    return report.main(["--results", str(place / "results"), "--page", str(place / "page.md"), *options])


def test_what_is_written_is_what_the_check_expects(place, capsys):
    assert run(place, "--check") == 1
    assert "-old" in capsys.readouterr().out
    assert (place / "page.md").read_text().count("old") == 1
    assert run(place) == 0
    page = (place / "page.md").read_text()
    assert page.startswith("before\n\n<!-- begin")
    assert page.endswith("-->\n\nafter\n")
    assert "faster in **2 of 3**" in page
    assert run(place, "--check") == 0
    # text of one's own is no difference; a changed number is
    (place / "page.md").write_text(page.replace("before", "before, in other words"))
    assert run(place, "--check") == 0
    (place / "page.md").write_text(page.replace("1.44", "1.45"))
    assert run(place, "--check") == 1
    assert run(place) == 0
    assert (place / "page.md").read_text() == page


def test_the_check_sees_new_results_and_old_plots(place, capsys):
    assert run(place) == 0
    plot = place / "page" / "cpu-throughput-ViT-B-16.png"
    before, memory = plot.read_bytes(), (place / "page" / "cpu-memory-ViT-B-16.png")
    changed = three_shapes("cpu")
    changed["results"][0]["q1"] *= 0.99  # in the plot's band only
    (place / "results" / "cpu" / "layer.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert run(place, "--check") == 1
    assert "cpu-throughput-ViT-B-16.png: not drawn from these results" in capsys.readouterr().out
    assert run(place) == 0
    assert run(place, "--check") == 0
    assert plot.read_bytes() != before
    memory.unlink()
    assert run(place, "--check") == 1
    (place / "results" / "cpu" / "layer.json").unlink()
    (place / "page" / "mine.png").write_bytes(png())
    assert run(place) == 0
    assert [path.name for path in (place / "page").iterdir()] == ["mine.png"]


def png():
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, format="png")
    return buffer.getvalue()


@pytest.mark.parametrize("text", ["no markers", f"{report.END} {report.BEGIN}", f"{report.BEGIN * 2} {report.END}"])
def test_a_page_without_its_markers_is_refused(place, text, capsys):
    (place / "page.md").write_text(text)
    assert run(place) == 2
    assert "once each" in capsys.readouterr().err
    assert (place / "page.md").read_text() == text


def test_devices_in_one_folder_are_refused(place, capsys):
    (place / "results" / "cpu" / "other.json").write_text(json.dumps(steps()))
    assert run(place) == 2
    assert "expected results of one device, got NVIDIA H200, cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_plots_are_drawn_and_carry_their_digest(tmp_path):
    wide = [
        layer(name, t, name=f"{stage}.{which}", m=m, dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for stage in "1234"
        for which in ("qkv", "fc1")
        for m in (49, 392)
        for name, t in ((results.OURS, 1e-3), (results.PRODUCTS, 9e-4))
    ]
    for chunks in (
        [three_shapes(), steps()],
        [three_shapes("cpu"), steps("cpu")],
        [chunk(wide, device="NVIDIA Unknown")],
    ):
        for name, plot in plots.plots(chunks).items():
            path = tmp_path / name
            path.write_bytes(plot.draw())
            with Image.open(path) as image:
                assert 1200 < image.width < 1700
                assert len(image.getcolors(1 << 16)) > 20
            assert plots.digest(path) == plot.digest
    assert plots._layers(groups([chunk(wide)])) == ["1.fc1", "2.fc1", "3.fc1", "4.fc1"]


def test_rates_of_a_plot():
    gpu, *_ = groups([three_shapes()])
    # slow quartile first: 1% more time than the median's
    assert plots._rates(gpu, results.OURS, True) == pytest.approx((14.1557 / 1.01, 14.1557, 14.1557 / 0.99), rel=1e-4)
    cpu, *_ = groups([three_shapes("cpu")])
    assert plots._rates(cpu, results.FACTORED, False)[1] == pytest.approx(0.5 / 3)
    assert plots._rates(cpu, results.RECOMPUTE, False) is None


def test_the_roofline():
    """H200: 989 TFLOP/s and 4.8 TB/s. One token, N = K = 1000: 6e6 flops over 4,010,000 bytes, so 7.18 TFLOP/s."""
    case = {"n": 1000, "k": 1000, "dtype": "bfloat16"}
    assert plots.roofline("NVIDIA H200", case, np.array([1.0, 1e5])) == pytest.approx([7.1820, 989], rel=1e-4)
    assert plots.roofline("NVIDIA A100-SXM4-80GB", case, np.array([1e5])) == pytest.approx([312])
    assert plots.roofline("NVIDIA Unknown", case, np.array([1.0])) is None
    assert plots.roofline("NVIDIA H200", case | {"dtype": "float32"}, np.array([1.0])) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 10], [0, 10]), ([5, 5], [4.5, 5.5]), ([5, 5, 5], [4, 5, 6]), ([0, 0.5, 10], [-0.25, 0.75, 10]), ([], [])],
)
def test_labels_keep_apart_and_near(values, expected):
    assert plots.apart(values, 1.0) == pytest.approx(expected)


def test_the_published_page_is_what_the_published_results_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def _ratio_cells(chunks):
    head, *lines = tables.ratios(groups(chunks)).splitlines()
    starts = [0, head.index("dtype"), head.index("dtype") + len("bfloat16") + 2]  # the third column has no head
    starts += [head.index(name) for name in ("formula", "best other", "for scale", "our memory")]
    return [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]


def test_ratios_are_others_over_ours_and_the_best_rival_is_named():
    layers = chunk(
        [
            layer(results.OURS, 2.0, extra_bytes=10),
            layer(results.CPU, 1.0),  # ours too, no rival
            layer(results.FORMULA, 5.0, extra_bytes=40),
            layer(results.FORMULA_COMPILED, 1.8),
            layer(results.RECOMPUTE, 3.0),
            layer(results.PLAIN, 1.0),  # another function: never the best
            layer(results.PRODUCTS, 1.5),
        ]
    )
    steps_ = chunk(
        [
            step(results.OURS, 1.0, peak_bytes=60),
            step(results.OFFICIAL, 1.9, peak_bytes=100),
            step(results.PROBE, 0.25, peak_bytes=20),
        ],
        "step",
    )
    assert _ratio_cells([layers, steps_]) == [
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
    failed = chunk([layer(results.OURS, "OutOfMemoryError: no"), layer(results.FORMULA, 1.0)])
    alone = chunk([launch(results.OURS, 1.0)], "launch")
    assert [row[3:] for row in _ratio_cells([failed, alone])] == [["failed", "", "", ""], ["", "", "", ""]]
