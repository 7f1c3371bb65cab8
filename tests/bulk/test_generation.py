from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from coalescer_fast import PhiloxGenerator, cli
from coalescer_fast.bulk import Model, Settings, check, generate, processes, settings, shards
from coalescer_fast.bulk.job import Drawn, Job, Ready
from coalescer_fast.bulk.prompt_file import noise_number
from coalescer_fast.console import open_pipeline
from tests.helpers.processes import context, workers

pq = pytest.importorskip("pyarrow.parquet")

PROMPTS = ["octopus", "red car", "owl, noto style", "rocket", "little kitten", "pizza", "the moon"]
SETTINGS = Settings(seed=3, per_shard=3)
WORKERS = {"workers": 1, "batch_size": 2}


@pytest.fixture(autouse=True, scope="module")
def start_fast():
    """Workers start from a server that has imported torch. Tests of the command spawn them, as the package does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "context", context)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A folder that nothing has disturbed. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("made")
    report = generate(source, folder, SETTINGS, **WORKERS)
    assert (report.shards, report.made, report.pictures, report.drawn) == (3, 3, 7, 7)
    assert 0 < report.quality < 1
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_pictures_are_those_of_the_pipeline(made):
    """By the generator that the record names; a picture and its record, in the layout that webdataset asks for."""
    from coalescer_fast import accelerate

    pipe = accelerate(open_pipeline("emoji-64"))
    pipe.set_progress_bar_config(disable=True)
    for shard, first in ((0, 0), (2, 6)):
        found = members(made / f"0000{shard}.tar")
        rows = range(first, min(first + 3, 7))
        assert list(found) == [f"{row:09d}.{ending}" for row in rows for ending in ("png", "txt", "json")]
        for row in rows:
            record = json.loads(found[f"{row:09d}.json"])
            out = pipe(PROMPTS[row], generator=PhiloxGenerator(3, picture=row))
            assert Image.open(io.BytesIO(found[f"{row:09d}.png"])).tobytes() == out.images[0].tobytes()
            assert found[f"{row:09d}.txt"].decode() == PROMPTS[row]
            assert record == {
                "key": f"{row:09d}",
                "id": str(row),
                "prompt": PROMPTS[row],
                "picture": 0,
                "seed": 3,
                "noise": row,
                "drawn": pipe.as_drawn([PROMPTS[row]], pipe.initial_noise(1, PhiloxGenerator(3, picture=row)))[0],
                "matched": out.matched[0].name,
                "similarity": out.matched[0].similarity,
                "quality": out.quality[0],
                "width": 64,
                "height": 64,
                "sha256": hashlib.sha256(found[f"{row:09d}.png"]).hexdigest(),
            }


def test_the_table_holds_the_records_of_the_tar(made):
    for tar in sorted(made.glob("*.tar")):
        found = [json.loads(content) for name, content in members(tar).items() if name.endswith(".json")]
        assert pq.read_table(tar.with_suffix(".parquet")).to_pylist() == found


def test_nothing_in_a_tar_says_when_or_by_whom(made):
    with tarfile.open(made / "00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_bytes_depend_neither_on_workers_nor_on_batches(source, made, tmp_path):
    generate(source, tmp_path / "other", SETTINGS, workers=2, batch_size=5, threads=2)
    assert hashes(tmp_path / "other") == hashes(made)


def test_bytes_do_not_depend_on_the_order_of_rows_but_on_ids(tmp_path):
    rows = [{"id": f"n{i}", "prompt": text} for i, text in enumerate(PROMPTS[:4])]
    found = {}
    for name, order in (("a", rows), ("b", rows[::-1])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in order))
        generate(path, tmp_path / name, Settings(pictures=2, per_shard=4), **WORKERS)
        content = members(tmp_path / name / "00000.tar")
        records = [json.loads(content[each]) for each in content if each.endswith(".json")]
        found[name] = {(each["id"], each["picture"]): (each["noise"], each["sha256"]) for each in records}
    assert found["a"] == found["b"]
    assert len(set(found["a"].values())) == 8


def test_the_best_are_those_of_all(source, tmp_path):
    """They have the names, noise and bytes that they have among all."""
    short = tmp_path / "short.txt"
    short.write_text("\n".join(PROMPTS[:3]))
    for name, keep in (("all", None), ("best", 2)):
        report = generate(short, tmp_path / name, Settings(pictures=4, keep_best=keep), **WORKERS)
        assert (report.pictures, report.drawn) == (3 * (keep or 4), 12)
    every, best = (members(tmp_path / name / "00000.tar") for name in ("all", "best"))
    assert {name: every[name] for name in best} == best
    records = [json.loads(content) for name, content in every.items() if name.endswith(".json")]
    assert [each["noise"] for each in records[:4]] == [noise_number(0, picture) for picture in range(4)]
    for row in range(3):
        of_row = sorted((each for each in records if each["id"] == str(row)), key=lambda each: -each["quality"])
        kept = {f"{each['key']}.png" for each in of_row[:2]}
        assert kept == {name for name in best if name.startswith(f"{row:09d}_") and name.endswith(".png")}


def test_exactly_what_is_missing_is_made(source, made, copy):
    times = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    (copy / "00001.parquet").unlink()  # killed between the two files
    (copy / "00002.tar").write_bytes((copy / "00002.tar").read_bytes()[:100])
    report = generate(source, copy, SETTINGS, **WORKERS)
    assert report.made == 2
    assert hashes(copy) == hashes(made)
    assert {path.name for path in copy.glob("*.tar") if path.stat().st_mtime_ns == times[path.name]} == {"00000.tar"}


def test_only_what_was_left_half_written_is_removed(source, copy):
    ours = [".00001.tar.1234567.0a1b2c3d.partial", ".00002.parquet.1.00000000.partial", ".run.json.5.0a1b2c3d.partial"]
    others = ["notes.txt", ".00001.tar.partial", ".mine.tar.1234567.0a1b2c3d.partial", "00001.tar.bak"]
    for name in (*ours, *others):
        (copy / name).write_text("x")
    (copy / ".00003.tar.7.0a1b2c3d.partial").mkdir()
    generate(source, copy, SETTINGS, **WORKERS)
    left = {path.name for path in copy.iterdir()}
    assert not left & set(ours)
    assert left >= {*others, ".00003.tar.7.0a1b2c3d.partial"}


DAMAGE = {
    "a bit of a picture": ("00001.tar", 700),
    "a bit of a tar's padding": ("00001.tar", -1),
    "a bit of a table": ("00001.parquet", 200),
    "a bit of a table's end": ("00001.parquet", -200),
    "the last bit of a table": ("00001.parquet", -1),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_every_damaged_bit_is_found_and_the_shard_made_again(source, made, copy, what, request):
    name, place = DAMAGE[what]
    content = bytearray((copy / name).read_bytes())
    content[place] ^= 1
    (copy / name).write_bytes(content)
    report = check(source, copy, SETTINGS)
    assert list(report.damaged) == [1]
    assert report.missing == []
    assert check(source, copy, SETTINGS).missing == [1]
    assert not shards.is_there(copy, 1)
    if what == "a bit of a picture":  # once: the run is the same for all
        assert generate(source, copy, SETTINGS, **WORKERS).made == 1
        assert hashes(copy) == hashes(made)
        assert check(source, copy, SETTINGS).damaged == {}


def test_shards_that_change_places_are_damaged(source, copy):
    for ending in ("tar", "parquet"):
        (copy / f"00000.{ending}").rename(copy / "x")
        (copy / f"00001.{ending}").rename(copy / f"00000.{ending}")
        (copy / "x").rename(copy / f"00001.{ending}")
    assert "another prompt" in check(source, copy, SETTINGS).damaged[0]


def test_a_shard_of_another_run_is_damaged_and_made_again(source, made, copy):
    run = settings.read(copy)
    foreign = copy.parent / "foreign"
    settings_of_it = Settings(**{**vars(run.settings), "guidance_scale": 2.0})
    shutil.copytree(copy, foreign)
    settings.write(foreign, settings.Run(**{**vars(run), "settings": settings_of_it}))
    shards.write(foreign, 1, samples(copy, 1))  # the same pictures, in another run
    for ending in ("tar", "parquet"):
        shutil.copy(foreign / f"00001.{ending}", copy)
    assert not shards.is_there(copy, 1)
    assert "of another run" in check(source, copy, SETTINGS).damaged[1]
    assert generate(source, copy, SETTINGS, **WORKERS).made == 1
    assert hashes(copy) == hashes(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: [found[0], found[0], found[2]], "a picture twice"),
        (lambda found: found[:2], "2 pictures, not 3"),
        (lambda found: [shards.Sample({**found[0].record, "seed": 4}, found[0].png), *found[1:]], "another prompt"),
    ],
)
def test_a_sealed_shard_of_wrong_records_is_damaged(source, copy, change, said):
    shards.write(copy, 1, change(samples(copy, 1)))
    assert said in check(source, copy, SETTINGS).damaged[1]


def samples(folder: Path, shard: int) -> list[shards.Sample]:
    found = members(folder / f"{shards.name(shard)}.tar")
    records = [json.loads(content) for name, content in found.items() if name.endswith(".json")]
    return [shards.Sample(record, found[f"{record['key']}.png"]) for record in records]


# what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, "seed 3, and here it is 4"),
        ({"pictures": 2}, "pictures 1, and here it is 2"),
        ({"per_shard": 4}, "per shard 3, and here it is 4"),
        ({"guidance_scale": 2.0}, "guidance scale none, and here it is 2.0"),
    ],
)
def test_other_settings_are_refused(source, copy, change, said):
    before = hashes(copy)
    asked = Settings(**{"seed": 3, "per_shard": 3, **change})
    with pytest.raises(ValueError, match=said):
        check(source, copy, asked)
    with pytest.raises(ValueError, match=said):
        generate(source, copy, asked, **WORKERS)
    assert hashes(copy) == before


def test_other_prompts_and_other_models_are_refused(copy, source, tmp_path):
    path = tmp_path / "more.txt"
    path.write_text("\n".join([*PROMPTS, "cat"]))
    with pytest.raises(ValueError, match="prompts of SHA-256"):
        check(path, copy, SETTINGS)
    with pytest.raises(ValueError, match="dtype bfloat16, and here it is float32"):
        generate(source, copy, SETTINGS, Model(dtype="float32"), **WORKERS)
    run = settings.read(copy)
    facts = {**run.facts, "model of SHA-256": "0" * 64}
    settings.write(copy, settings.Run(**{**vars(run), "facts": facts}))
    with pytest.raises(ValueError, match="model of SHA-256 0000"):
        generate(source, copy, SETTINGS, **WORKERS)


def test_settings_bind_once_there_is_a_shard(source, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale"):
        generate(source, tmp_path / "out", Settings(guidance_scale=1e9), **WORKERS)
    assert not list((tmp_path / "out").glob("0*"))
    generate(source, tmp_path / "out", SETTINGS, **WORKERS)


def test_a_folder_of_other_shards(source, copy):
    (copy / "run.json").unlink()
    with pytest.raises(ValueError, match=r"without the run\.json"):
        generate(source, copy, SETTINGS)
    with pytest.raises(ValueError, match=r"has no run\.json"):
        check(source, copy, SETTINGS)
    for content in (b"", b"[]", b"\xff", b'{"format": 1}', b"[" * 100_000):
        (copy / "run.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.json (is damaged|cannot be read)") as error:
            generate(source, copy, SETTINGS)
        assert "\n" not in str(error.value)


def test_one_run_at_a_time(source, copy):
    from filelock import FileLock

    with FileLock(copy / ".lock"):
        for call in (generate, check):
            with pytest.raises(ValueError, match="in use by another run"):
                call(source, copy, SETTINGS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"pictures": 0}, "pictures is 0"),
        ({"keep_best": 2}, "keep_best is 2 and pictures of a prompt are 1"),
        ({"num_inference_steps": "many"}, "num_inference_steps is 'many'"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"negative_prompt": "\ud83e"}, "negative_prompt"),
        ({"per_shard": 0}, "per_shard is 0"),
    ],
)
def test_settings_that_are_none(change, said):
    with pytest.raises(ValueError, match=said):
        Settings(**change)


@pytest.mark.parametrize("name", ["workers", "threads", "batch_size"])
def test_counts_that_are_none(source, tmp_path, name):
    for count in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"{name} is {count}"):
            generate(source, tmp_path / "out", SETTINGS, **{name: count})
    assert not (tmp_path / "out").exists()


def test_a_worker_that_dies_is_replaced(source, made, tmp_path, monkeypatch):
    """It is killed when half of a shard is drawn, three times."""
    heard, original = [], processes.run

    def run(*arguments):
        for event in original(*arguments):
            heard.append(event)
            if isinstance(event, Drawn) and sum(isinstance(each, Ready) for each in heard) <= 3:
                for process in multiprocessing.active_children():
                    process.kill()
                    process.join()
            yield event

    monkeypatch.setattr(processes, "run", run)
    report = generate(source, tmp_path / "out", SETTINGS, **WORKERS)
    assert (report.made, report.drawn) == (3, 7)
    assert sum(isinstance(each, Ready) for each in heard) == 4
    assert sum(each.pictures for each in heard if isinstance(each, Drawn)) == 7
    assert hashes(tmp_path / "out") == hashes(made)


def test_a_worker_that_dies_too_often_is_said(monkeypatch, source, tmp_path):
    monkeypatch.setattr(processes, "_work", _die)
    with pytest.raises(ValueError, match=r"ended with signal SIGKILL before it could draw, 5 times") as error:
        generate(source, tmp_path / "out", SETTINGS, workers=2)
    assert "\n" not in str(error.value)


def _die(connection, job):
    os.kill(os.getpid(), signal.SIGKILL)


# the command


def command(*arguments: str | Path, **options) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    line = [sys.executable, "-m", "coalescer_fast", "generate", *map(str, arguments)]
    # at the root, so that it is the package that is installed
    return subprocess.Popen(
        line, cwd=os.sep, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_a_killed_run_gone_on_with(source, made, tmp_path):
    out, options = tmp_path / "out", ("--seed", "3", "--per-shard", "3", "--workers", "1")
    run = command(source, "-o", out, *options)
    while not (running := workers(run.pid)):
        time.sleep(0.01)
    while not out.is_dir() or not list(out.glob(".0*.partial")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.001)
    for worker in running:
        os.kill(worker, signal.SIGKILL)
    assert run.wait() == 0
    said = run.stderr.read()
    assert "7 pictures in 3 shards" in said
    assert "leaked" not in said
    assert hashes(out) == hashes(made)

    (out / "00002.parquet").unlink()
    run = command(source, "-o", out, *options)
    while not list(out.glob(".00002*.partial")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.001)
    running = workers(run.pid)
    run.kill()  # the run alone: its worker has to see that by itself
    run.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in running):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert cli.main(["generate", str(source), "-o", str(out), *options, "--quiet"]) == 0
    assert hashes(out) == hashes(made)


def test_the_command_says_what_is_damaged(source, copy, capsys):
    line = ["generate", str(source), "-o", str(copy), "--seed", "3", "--per-shard", "3", "--check"]
    assert cli.main(line) == 0
    assert "7 pictures in 3 shards, all whole" in capsys.readouterr().err
    (copy / "00001.tar").write_bytes(b"x")
    (copy / "00002.tar").unlink()
    assert cli.main(line) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"coalescer-fast: of 3 shards 1 are damaged and 1 missing \(00001.*\): run .*\n", error)


def test_mistakes_are_one_sentence(source, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for line, said in (
        ([str(empty), "-o", str(tmp_path / "a")], "holds no prompts"),
        ([str(source), "-o", str(tmp_path / "a"), "--keep-best", "2"], "draw more, or keep fewer"),
        ([str(source), "-o", str(source)], "cannot"),
        ([str(source), "-o", str(tmp_path / "b"), "--model", "nothing"], "there is no model 'nothing'"),
    ):
        assert cli.main(["generate", *line, "--quiet"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("coalescer-fast: ")
        assert error.count("\n") == 1
        assert said in error


# other programs


def test_webdataset_reads_it(made):
    webdataset = pytest.importorskip("webdataset")
    found = list(webdataset.WebDataset([str(p) for p in sorted(made.glob("*.tar"))], shardshuffle=False).decode("pil"))
    assert [each["txt"] for each in found] == PROMPTS
    assert all(each["png"].size == (64, 64) and each["json"]["prompt"] == each["txt"] for each in found)


def test_datasets_reads_it(made, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in sorted(made.glob("*.tar"))]
    found = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "a"))
    assert found["txt"] == PROMPTS
    assert found[0]["png"].size == (64, 64)
    tables = [str(path) for path in sorted(made.glob("*.parquet"))]
    found = datasets.load_dataset("parquet", data_files=tables, split="train", cache_dir=str(tmp_path / "b"))
    assert found["prompt"] == PROMPTS
    assert all(0 <= quality <= 1 for quality in found["quality"])


def test_an_actor_whose_machine_differs_makes_nothing(monkeypatch, tmp_path):
    from coalescer_fast.bulk import drawing
    from coalescer_fast.bulk.ray_data import ShardMaker

    monkeypatch.setattr(drawing, "Drawer", lambda job: SimpleNamespace(facts={"instruction set": "avx2"}, make=None))
    job = Job(tmp_path, SETTINGS, Model(), 1, 1)
    [answer] = ShardMaker()({"task": [pickle.dumps((job, {"instruction set": "avx512"}, 0, []))]})["made"]
    assert re.match("a worker has instruction set avx2 and the run avx512: let ", pickle.loads(answer))
    assert not list(tmp_path.iterdir())
