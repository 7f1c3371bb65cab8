"""README.md and docs/results.md: their tables hold what the committed CSV files hold."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.networks import report
from benchmarks.quality.report import tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/results.md"))
MODELS = ("emoji-64", "m")
GUIDANCE = json.loads((ROOT / "coalescer_fast/weights/emoji-64/scheduler/scheduler_config.json").read_text())[
    "guidance_scale"
]
PROVIDERS = (
    ("eager", "fp32"),
    ("ours", "bf16"),
    ("ours_int8", "int8"),
    ("openvino", "bf16"),
    ("compile", "bf16"),
    ("onnxruntime", "fp32"),
    ("convolutions", "bf16"),
)


def rows(name: str, **wanted: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def sampler(model: str, batch: int, provider: str, dtype: str) -> dict[str, str]:
    wanted = {"model": model, "batch": str(batch), "provider": provider, "dtype": dtype}
    [row] = [row for row in rows("cpu/sampler.csv", part="sampler", **wanted) if float(row["guidance_scale"]) == 1]
    return row


def milliseconds(row: dict[str, str]) -> str:
    """Three digits, and ~ where threads had to wait."""
    time = float(f"{float(row['y_value_50']):.3g}")
    return f"{time:g}" + "~" * (float(row["quiet"]) == 0)


def cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def line(page: str, start: str, after: str = "") -> list[str]:
    """The cells behind the first one, of the row that begins with ``start``, the first one behind ``after``."""
    rest = page[page.index(after) :]
    return next(cells(each)[1:] for each in rest.splitlines() if each.startswith("|") and cells(each)[0] == start)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("model", MODELS)
def test_times_of_the_sampler(model, batch):
    times = [milliseconds(sampler(model, batch, *provider)) for provider in PROVIDERS]
    name = f"{model}, {batch} picture{'s' * (batch > 1)}"
    assert line(PAGE, name) == times
    assert line(README, name) == times[:-1]
    errors = [float(sampler(model, batch, *PROVIDERS[i])["result_error"]) for i in (1, 2, 3, 4)]
    assert line(PAGE, name, "The relative error") == [f"{100 * error:.2f}" for error in errors]


def test_time_to_the_first_picture():
    seconds = [f"{float(row['y_value_50']) / 1e3:.1f}" for row in rows("cpu/sampler.csv", part="cold")]
    assert [line(PAGE, seconds[0]), len(seconds)] == [seconds[1:], 3]


@pytest.mark.parametrize("op", ["group_norm_silu", "bias_residual", "dual_head", "coalesce_step"])
def test_speed_of_the_ops(op):
    def ratios(peer: str, dtype: str) -> str:
        found: dict[tuple[str, ...], dict[str, float]] = {}
        wanted = {"kernel_name": op, "dtype": dtype, "cache": "warm", "metric_name": "time", "status": "ok"}
        for row in rows("cpu/kernels.csv", **wanted, quiet="1"):
            call = (row["shapes"], row["batch"], row["extra_benchmark_config_str"])
            found.setdefault(call, {})[row["kernel_provider"]] = float(row["y_value_50"])
        speeds = [times[peer] / times["cpu"] for times in found.values() if {peer, "cpu"} <= times.keys()]
        return f"{statistics.median(speeds):.2f} ({min(speeds):.2f} – {max(speeds):.2f})"

    expected = [ratios(peer, dtype) for peer in ("eager", "compile") for dtype in ("fp32", "bf16")]
    assert line(PAGE, f"`{op}`") == expected


# headings of docs/results.md, and folders of results
GPUS = {"Speed of the ops on an H100": "nvidia-h100-80gb-hbm3", "On an H200": "nvidia-h200"}


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(("heading", "folder"), GPUS.items())
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", ["group_norm_silu", "bias_residual", "dual_head", "coalesce_step"])
def test_speed_of_the_ops_on_a_gpu(op, backend, heading, folder):
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows(
        f"{folder}/kernels.csv", kernel_name=op, dtype="bf16", cache="warm", metric_name="time", status="ok"
    ):
        call = (row["shapes"], row["batch"], row["extra_benchmark_config_str"])
        found.setdefault(call, {})[row["kernel_provider"]] = float(row["y_value_50"])

    def ratios(*peers: str) -> str:
        pairs = [(times, [times[peer] for peer in peers if peer in times]) for times in found.values()]
        speeds = [min(others) / times[backend] for times, others in pairs if others and backend in times]
        return f"{statistics.median(speeds):.2f} ({min(speeds):.2f} – {max(speeds):.2f})" if speeds else "–"

    table = [cells(each) for each in section(heading).splitlines() if each.startswith(f"| `{op}` | `{backend}` |")]
    expected = [ratios("eager", "eager_contiguous"), ratios("compile"), ratios("chunked")]
    assert table == [[f"`{op}`", f"`{backend}`", *expected[: len(table[0]) - 2]]]


@pytest.mark.parametrize(("heading", "folder"), GPUS.items())
def test_share_of_the_copy_on_a_gpu(heading, folder):
    wanted = {"kernel_name": "group_norm_silu", "kernel_provider": "cuda", "dtype": "bf16", "cache": "warm"}
    found = [row for row in rows(f"{folder}/kernels.csv", **wanted) if float(row["x_value"]) >= 64e6]
    large = [float(row["percent_of_copy"]) for row in found]
    assert f"reaches {min(large):.0f} to {max(large):.0f} %" in " ".join(section(heading).split())


def test_the_sampler_on_an_h100():
    found: list[tuple[tuple[str, ...], dict[str, float]]] = []
    for row in rows("nvidia-h100-80gb-hbm3/sampler.csv", part="sampler", status="ok"):
        if row["provider"] == "ours":  # of a run of the command; the others beside it follow
            found.append(((row["model"], row["guidance_scale"], row["batch"]), {}))
        found[-1][1][row["provider"]] = float(row["y_value_50"])
    expected: dict[tuple[str, ...], list[str]] = {}
    for key, times in found:
        cells_of = expected.setdefault(key, [""] * 4)
        if "compile_graphs" in times:
            cells_of[1] = f"{times['compile_graphs']:.3g} ({times['compile_graphs'] / times['ours']:.2f})"
        else:
            cells_of[::2] = [f"{times[name]:.3g}" for name in ("ours", "eager_channels_last")]
            cells_of[3] = f"{times['convolutions']:.3g}"
    lines = [cells(each) for each in section("The sampler on an H100").splitlines() if each.startswith("| `")]
    named = [[f"`{model}`" + ", guided" * (scale != "1"), batch] for model, scale, batch in expected]
    assert lines == [[*name, *(each or "–" for each in times)] for name, times in zip(named, expected.values())]
    own = expected["emoji-64", "1", "1"]
    assert f"Two steps of `emoji-64` take {own[0]} ms [on an H100]" in " ".join(README.split())
    assert float(own[1].split("(")[1].rstrip(")")) > 2


def test_networks_on_an_h200():
    named = {"sd-turbo, latents 64×64, batch 1, one evaluation": "networks", "`l`, batch 1, two evaluations": "sampler"}
    for name, file in named.items():
        times = {row["provider"]: f"{float(row['y_value_50']):.3g}" for row in rows(f"nvidia-h200/{file}.csv")}
        ours = times.get("coalescer_fast") or times["ours"]
        assert line(PAGE, name) == [ours, times.get("eager_graph", "–"), times["eager_channels_last"]]
    [ours], [graph] = (rows("nvidia-h200/networks.csv", provider=name) for name in ("coalescer_fast", "eager_graph"))
    told = " ".join(section("On an H200").split())
    assert f"{float(graph['y_value_50']) / float(ours['y_value_50']):.2f} times as fast" in told
    assert (
        f"a relative error of {100 * float(ours['error']):.1f} %, where eager's is {100 * float(graph['error']):.1f} %"
        in told
    )
    assert f"takes {float(ours['latency_ms']):.2f} ms" in told


def test_quality():
    [row] = rows("evaluate.csv", steps="2")
    value = {name: float(text) for name, text in row.items()}
    expected = {
        "nearest real picture shows the right emoji": (
            f"{value['name_top1']:.3f}",
            f"among the ten nearest: {value['name_top10']:.3f}",
        ),
        "the same, name and an existing style": (f"{value['name_style_all_top1']:.3f}", ""),
        "the same, three keywords": (
            f"{value['keyword_top1']:.3f}",
            f"among the ten nearest: {value['keyword_top10']:.3f}",
        ),
        "free wordings": (f"{value['free_wording']:.3f}", ""),
        "Fréchet distance": (
            f"{value['fd_name']:.1f} / {value['fd_name_style']:.1f}",
            f"autoencoder {value['fd_floor_autoencoder']:.1f}, real against real {value['fd_floor_real']:.1f}",
        ),
        "distinct styles": (f"{value['styles_hit']:.2g}", f"real: {value['styles_real']:.1f}"),
        "autoencoder, held-out": (f"{value['psnr_autoencoder_held_out']:.1f} dB", ""),
        "held-out emoji": (f"{value['held_out_group']:.2f}", f"chance: {value['held_out_group_chance']:.2f}"),
        "samples nearer": (f"{value['below_q5']:.2f}", "real: 0.05"),
        "rank correlation": (f"{value['direction_length_spearman']:.2f}", ""),
        "R² of the distance": (f"{value['distance_r2']:.2f}", ""),
    }
    table = PAGE[PAGE.index("| figure | value |") :].replace("\\|", "").split("\n\n")[0].splitlines()[2:]
    found = [cells(each) for each in table]
    assert len(found) == len(expected)
    for (what, *shown), (start, numbers) in zip(found, expected.items()):
        assert what.startswith(start)
        assert shown == list(numbers)


def test_against_the_rivals():
    found = rows("rivals.csv")
    for each in tables(found):
        assert each in PAGE.splitlines()
    methods = {row["method"] for row in found}
    assert len(methods) >= 5
    short = [row for row in found if int(row["steps"]) <= 8]
    assert {(row["method"], row["seed"]) for row in short} == {(method, seed) for method in methods for seed in "01"}
    assert {row["training_steps"] for row in found} == {"3328"}
    told = " ".join(section("Against its rivals").split())

    def mean(column: str, method: str, guidance: float, steps: int) -> float:
        wanted = {"method": method, "steps": str(steps)}
        some = [row for row in found if row.items() >= wanted.items() and float(row["guidance_scale"]) == guidance]
        assert len(some) == 2
        return statistics.fmean(float(row[column]) for row in some)

    ours, theirs = ("coalescer", 1.5, 2), ("flow matching", 1, 2)
    assert f"({mean('fd_name', *ours):.1f} against {mean('fd_name', *theirs):.1f} of the next" in told
    assert f"{mean('free_wording', *ours):.2f} of its samples are right and" in told
    assert f"and {mean('free_wording', *theirs):.2f} of flow matching's" in told
    assert f"distance is {mean('fd_name', 'flow matching', 1.5, 1):.0f}." in told
    others = [row for row in short if not row["method"].startswith("coalescer")]
    within = [row for row in others if int(row["evaluations"]) <= 3]
    assert mean("fd_name", *ours) < min(float(row["fd_name"]) for row in within) - 10
    assert min(float(row["fd_name"]) for row in others if int(row["evaluations"]) <= 8) > 20
    ratios = [mean("nearest_train_ratio", "consistency", 1, steps) for steps in (2, 1)]
    assert "picture ({:.2f} of the distance between neighbours) than after the first ({:.2f})".format(*ratios) in told


def test_how_often_mean_flow_is_trained_over_a_long_span():
    """P(|s(a) - s(b)| >= 0.9), s the sigmoid, a and b of N(0.4, 1), as `mean_flow_loss` draws times."""
    a, step = np.linspace(-8, 9, 20_001, retstep=True)
    s = 1 / (1 + np.exp(-a))
    low = s <= 0.1  # the other one is then at least 0.9 above
    needed = np.log((s[low] + 0.9) / (0.1 - s[low] + 1e-12))
    above = np.array([math.erfc((x - 0.4) / math.sqrt(2)) / 2 for x in needed])
    chance = 2 * float((np.exp(-((a[low] - 0.4) ** 2) / 2) / math.sqrt(2 * math.pi) * above).sum() * step)
    told = " ".join(section("Against its rivals").split())
    assert f"a span of 0.9 or more once in {round(1 / chance, -4):,.0f} samples" in told
    assert f"had {round(3328 * 64 // 4, -3):,} with a span" in told


def test_guidance():
    columns = {"fd_name": 1, "fd_name_style": 1, "name_top1": 3, "keyword_top1": 3, "free_wording": 3, "below_q5": 2}
    expected = []
    for row in rows("guidance.csv"):
        scale = float(row["guidance_scale"])
        name = "1, none" if scale == 1 else f"{scale:g}, the default" * (scale == GUIDANCE) or f"{scale:g}"
        expected.append([name, row["evaluations"], *(digits(row[column], count) for column, count in columns.items())])
    assert table_of("| guidance |", "## Guidance") == expected


def digits(value: str, count: int = 3) -> str:
    return "–" if value in ("", "nan") else f"{float(value):.{count}f}"


def table_of(heading: str, after: str) -> list[list[str]]:
    """The cells of a table of the page, without its heading."""
    rest = PAGE[PAGE.index(heading, PAGE.index(after)) :].replace("\\|", "¦")
    return [[cell.replace("¦", "|") for cell in cells(each)] for each in rest.split("\n\n")[0].splitlines()[2:]]


def test_quality_of_each_picture():
    alone = ("direction_length_1", "direction_length_2", "similarity", "margin")
    columns = ("right", "quality", "auc", *(f"auc_{feature}" for feature in alone))
    expected = [
        [row["wordings"], f"{int(row['pictures']):,}", *(digits(row[name]) for name in columns)]
        for row in rows("grading.csv")
        if not row["wordings"].startswith("reliability")
    ]
    assert table_of("| wordings |", "## Quality of each picture") == expected


def test_the_best_of_four():
    found = table_of("| signal |", "### The best of four")
    made, free = (rows("best_of.csv", wordings=name) for name in ("made wordings", "free wordings"))
    assert len(found) == len(made) == len(free)
    for line, *pair in zip(found, made, free):
        expected = [pair[0]["signal"]]
        for row in pair:
            gain = f"{float(row['gain']):+.3f} ± {digits(row['standard_error'])}"
            expected += [digits(row["within_auc"], 2), digits(row["best_of_4"]), gain]
        assert line == expected
    shares = [digits(row[name]) for name in ("one", "any_of_4") for row in (made[0], free[0])]
    assert "right in {} and {}; any of four is in {} and {}".format(*shares) in " ".join(PAGE.split())


def test_as_many_steps_as_needed():
    expected = []
    for row, dealt in zip(rows("auto.csv"), [*rows("auto.csv")[1:], {}]):
        if row["sampler"] != "chance":
            auto = row["sampler"] == "auto"
            name = f"auto, {float(row['arrival_distance']):g}" if auto else row["sampler"]
            figures = [digits(row["evaluations"], 2), digits(row["fd_name"], 1)]
            figures += [digits(row[column]) for column in ("name_top1", "keyword_top1")]
            expected.append([name, *figures, digits(dealt["fd_name"], 1) if auto else "–"])
    assert table_of("| | evaluations |", "## As many steps as needed") == expected


@pytest.mark.parametrize("what", ["unet", "decoder", "generator"])
def test_speed_of_exported_graphs(what):
    def speeds(threads: int) -> str:
        found = rows("cpu/export.csv", what=what, precision="int8", threads=str(threads))
        return ", ".join(f"{float(row['speedup_over_fp32']):.1f}" for row in found)

    assert line(PAGE, {"unet": "UNet"}.get(what, what), "## Exported graphs") == [speeds(1), speeds(2)]


def test_error_of_int8_exports():
    row = rows("cpu/export.csv", what="generator", precision="int8")[0]
    figures = f"{float(row['psnr_median_db']):.1f} dB at the median, and {float(row['psnr_minimum_db']):.1f} dB"
    assert figures in re.sub(r"\s+", " ", PAGE)
    for name, file in (("reference, float32", "evaluate.csv"), ("ONNX Runtime, int8", "cpu/evaluate_int8.csv")):
        [row] = rows(file, steps="2")
        distances = [f"{float(row[column]):.1f}" for column in ("fd_name", "fd_name_style")]
        shares = [f"{float(row[column]):.3f}" for column in ("name_top1", "keyword_top1")]
        assert line(PAGE, name) == distances + shares


def test_networks():
    """The tables as `python -m benchmarks.networks --summary` prints them."""
    tables = "\n".join(report.tables(rows("cpu/networks.csv")))
    assert tables.strip() in PAGE


def test_what_8_bits_cost():
    page = (ROOT / "docs/kernels/programs.md").read_text("utf-8")
    for row in rows("int8.csv"):
        figures = [f"{100 * float(row[key]):.2f}" if row[key] else "–" for key in ("alone", "without")]
        name = "**chosen**" if row["kind"] == "chosen" else row["kind"]
        assert f"| {name} | {row['products'] or '–'} | {' | '.join(figures)} |" in page
