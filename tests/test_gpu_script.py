"""The GPU script, tried on tiny sizes, and training together."""

import copy
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from abdlab import augment
from abdlab.checkpoint import load_state, read_card
from abdlab.errors import Diverged
from abdlab.train_together import moved, rate_at, train_together

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402, I001


# ------------------------------------------------------------------ training together


def test_moved_is_pad_crop_and_flip_image_by_image():
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(9, 3, 6, 5, generator=rng)
    offsets = torch.randint(0, 5, (2, 9), generator=rng)
    mirrored = torch.randint(0, 2, (9,), generator=rng)
    found = moved(images, offsets, mirrored, 2)
    for i, image in enumerate(images):
        y, x = offsets[:, i]
        wanted = F.pad(image, [2] * 4)[:, y : y + 6, x : x + 5]
        assert torch.equal(found[i], wanted.flip(-1) if mirrored[i] else wanted)


def test_moved_leaves_images_where_they_are_without_a_shift():
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    still = moved(images, torch.zeros(2, 4, dtype=torch.long), torch.zeros(4), 0)
    assert torch.equal(still, images)
    assert torch.equal(still, augment(images, 0, False, torch.Generator()))


def test_the_rate_rises_and_falls_in_straight_lines():
    rates = [rate_at(i, 20, 0.5, 0.25) for i in range(20)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.5 / 15)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_training_together_is_sgd_step_by_step(wrn, digits):
    """Against a loop of torch's own parts, one network and a fixed order at a time."""
    images, labels = digits.train_images[:40], digits.train_labels[:40]
    sets = [(images, labels), (images.flip(-1), labels)]
    models = [wrn(seed=i) for i in range(2)]
    literal = copy.deepcopy(models)
    steps = list(train_together(models, sets, epochs=2, batch_size=10, lr=0.1, device="cpu"))
    assert [[step.index for step in pair] for pair in steps] == [[1, 1], [2, 2]]
    for number, (model, (images, labels)) in enumerate(zip(literal, sets, strict=True)):
        rng, step, losses = torch.Generator().manual_seed(0), 0, []
        sgd = torch.optim.SGD(
            model.train().parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        for _ in range(2):
            order = torch.randperm(40, generator=rng)
            torch.randint(0, 1, (2, 40), generator=rng)
            torch.randint(0, 1, (40,), generator=rng)
            for chosen in order.split(10):
                sgd.param_groups[0]["lr"] = rate_at(step, 8, 0.1, 0.2)
                loss = F.cross_entropy(model(images[chosen]), labels[chosen])
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                step += 1
                losses.append(loss.item())
        found = steps[-1][number].losses["cross_entropy"]
        assert found == pytest.approx(sum(losses[-4:]) / 4, rel=1e-4)
        for p, q in zip(models[number].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_training_together_refuses_what_does_not_fit(wrn, digits):
    images, labels = digits.train_images[:8], digits.train_labels[:8]
    with pytest.raises(ValueError, match=r"1 models and sets of \[8\]"):
        next(train_together([wrn()], [(images, labels)] * 2, device="cpu"))
    with pytest.raises(ValueError, match=r"sets of \[4, 8\]"):
        next(train_together([wrn()], [(images, labels[:4])], device="cpu"))
    with pytest.raises(ValueError, match="graphs=True needs a CUDA device"):
        next(train_together([wrn()], [(images, labels)], graphs=True, device="cpu"))


def test_a_network_that_diverges_is_named(wrn, digits):
    images, labels = digits.train_images[:8], digits.train_labels[:8]
    broken = wrn(seed=1)
    torch.nn.init.constant_(broken.fc.bias, float("nan"))
    with pytest.raises(Diverged, match="in epoch 1 the cross-entropy of network 1 is nan"):
        list(train_together([wrn(), broken], [(images, labels)] * 2, epochs=1, device="cpu"))


# ------------------------------------------------------------------ the script


def run(folder, seconds, *stages):
    """These stages in tiny sizes, on the CPU."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "run", str(folder), "--tiny"]
    command += ["--scratch", str(folder / "scratch"), "--seconds", str(seconds), "--stages"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *stages], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def lease(tmp_path_factory):
    """A whole run in tiny sizes, without the two stages that take their time to no end
    on a CPU: the tests, which are skipped there, and the compiler.
    """
    folder = tmp_path_factory.mktemp("lease")
    stages = [stage for stage in gpu.STAGES if stage not in ("tests", "compile")]
    began = time.monotonic()
    done = run(folder, 300, *stages)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "log.txt").read_text()
    return folder, gpu.rows_of(folder), time.monotonic() - began


@pytest.mark.slow
def test_every_stage_of_a_tiny_run_is_done_in_time(lease):
    _, rows, seconds = lease
    assert seconds < 300  # a minute on an idle core
    ended = {row["stage"]: row["kind"] for row in rows if "codes" in row}
    assert ended == dict.fromkeys(["speed", "together", "teachers", "students", "long"], "done")
    assert not [row for row in rows if row["kind"] == "failed"]


@pytest.mark.slow
def test_rows_say_what_was_measured(lease):
    _, rows, _ = lease
    speed = [row for row in rows if row["kind"] == "speed"]
    assert {row["way"] for row in speed} >= {"naive, eager", *gpu.WAYS}
    assert {row["runs"] for row in speed} == {1, 2}
    assert all(row["steps_per_s"] > 0 for row in speed)
    teachers = {row["teacher"]: row for row in rows if row["kind"] == "teacher"}
    assert list(teachers) == list(gpu.TEACHERS)
    # ten colours are soon told apart
    assert all(row["acc"] > 0.4 for row in teachers.values())
    students = [row for row in rows if row["kind"] == "student" and row["index"] == row["total"]]
    found = {(row["teacher"], row["source"], row["defense"]) for row in students}
    for teacher in gpu.WITH_STUDENTS[:2]:
        assert {(teacher, "zskt", "none"), (teacher, "zskt", "abd")} <= found
    assert all(0 <= row["acc"] <= 1 and 0 <= row["asr"] <= 1 for row in students)
    # rows of one source have one length, so that they can be compared
    for source in {row["source"] for row in students}:
        assert len({row["total"] for row in students if row["source"] == source}) == 1


@pytest.mark.slow
def test_the_report_has_each_table_and_the_note_that_it_is_tiny(lease):
    folder, _, _ = lease
    text = (folder / "report.md").read_text()
    for part in ("## Speed", "## Teachers", "## Students", "tiny, to try the script"):
        assert part in text
    assert "CUDA graphs: not measured, these figures are a CPU's." in text
    assert (folder / "report.csv").read_text().startswith("kind,stage,lease")


@pytest.mark.slow
def test_the_long_run_goes_on_in_a_second_lease_and_teachers_are_kept(lease):
    folder, before, _ = lease
    teachers = (folder / "teachers.safetensors").read_bytes()
    done = run(folder, 150, "teachers", "long")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "teachers.safetensors").read_bytes() == teachers
    rows = gpu.rows_of(folder)[len(before) :]
    assert "kept" in {row["kind"] for row in rows}
    first, second = [
        next(row for row in found if row["kind"] == "long") for found in (before, rows)
    ]
    assert (first["first"], first["index"], second["first"], second["index"]) == (1, 6, 7, 12)
    assert read_card(folder / "long.safetensors")["index"] == 12
    state, card = load_state(folder / "teachers.safetensors")
    assert set(state) == set(gpu.TEACHERS)
    assert card["model"]["name"] == "wrn-10-1"


class Process:
    """Just what watch asks of a stage's process, a real one."""

    def __init__(self, code):
        self.process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    end = gpu.Child.end


def test_a_stage_that_hangs_is_killed_and_one_that_fails_is_a_row(tmp_path):
    record = gpu.Record(tmp_path, "speed", "now", True)
    hanging = Process("import time; time.sleep(60)")
    assert gpu.watch([hanging, Process("")], 0.5, record) == "killed"
    assert hanging.process.returncode == -9
    assert gpu.watch([Process("raise SystemExit(3)")], 20, record) == "failed"
    assert gpu.watch([Process("")], 20, record) == "done"
    rows = gpu.rows_of(tmp_path)
    assert [row["kind"] for row in rows] == ["killed", "failed", "done"]
    assert rows[1]["codes"] == [3]


@pytest.mark.slow
def test_an_error_in_a_stage_becomes_a_row_and_the_parent_goes_on(tmp_path):
    done = run(tmp_path, 100, "long")
    assert done.returncode == 1
    rows = gpu.rows_of(tmp_path)
    errors = [row["error"] for row in rows if "error" in row]
    assert len(errors) == 1
    assert "there are no teachers: their stage failed or was cut" in errors[0]
    assert "- long long: failed. " in (tmp_path / "report.md").read_text()


def row(**fields):
    return {"kind": "speed", "stage": "speed", "lease": "a", "runs": 1, "peak_mb": 5, **fields}


@pytest.mark.parametrize(("graphs", "verdict"), [(149, "go"), (150, "stay")])
def test_graphs_stay_from_one_and_a_half_times_on(graphs, verdict):
    rows = [row(way="eager", steps_per_s=100), row(way="graphs", steps_per_s=graphs)]
    assert gpu.decision(rows).startswith(f"CUDA graphs {verdict}: {graphs / 100:.2f}x in float32")
    assert gpu.decision(rows[:1]) == "CUDA graphs: not measured."


def test_merge_joins_leases_and_the_later_row_counts(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    students = [
        {"kind": "student", "stage": "students", "teacher": "blend", "source": "zskt"}
        | {"defense": "none", "seed": seed, "acc": acc, "asr": 0.5, "index": 9, "total": 9}
        for seed, acc in ((0, 0.6), (1, 0.8))
    ]
    begun = {"kind": "begun", "stage": "speed", "card": "a card", "torch": "9"}
    for folder, lease, rows in (
        (first, "2026-01-01T", [begun, row(way="eager", steps_per_s=1), *students]),
        (second, "2026-01-02T", [begun, row(way="eager", steps_per_s=7)]),
    ):
        folder.mkdir()
        lines = [json.dumps({**r, "lease": lease}) for r in rows]
        # a row that was being written when the machine was taken away
        (folder / "rows.jsonl").write_text("\n".join([*lines, '{"kind": "spe']))
    text = gpu.merge([second, first], tmp_path)
    assert "| 2026-01-01T | a card | 9 | 2026-01-01 |" in text
    assert "| 2026-01-02T | a card | 9 | 2026-01-02 |" in text
    assert "| eager | 1 | 7 |" in text
    assert "| eager | 1 | 1 |" not in text
    assert "| blend | zskt | none | 9 of 9 | 0, 1 | 70.0 ± 14.1 / 50.0 ± 0.0 |" in text


def test_an_archive_is_decoded_in_one_order_whatever_its_own(tmp_path):
    import numpy as np

    colours = {"cat": (250, 5, 5), "dog": (5, 250, 5)}
    found = []
    for turn in (1, -1):
        archive = tmp_path / f"{turn}.tar.xz"
        names = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in colours for i in range(3)]
        with tarfile.open(archive, "w:xz") as file:
            for name in names[::turn]:
                picture, data = Image.new("RGB", (4, 4), colours[name.split("/")[1]]), io.BytesIO()
                picture.save(data, "png")
                info = tarfile.TarInfo(name)
                info.size = len(data.getvalue())
                file.addfile(info, io.BytesIO(data.getvalue()))
        with np.load(gpu.decode(archive, tmp_path, processes=1), allow_pickle=False) as file:
            found.append({name: file[name] for name in file.files})
    assert found[0]["train_images"].shape == (6, 3, 4, 4)
    for split in ("train", "test"):
        images, labels = found[0][f"{split}_images"], found[0][f"{split}_labels"]
        assert (images[:, 0, 0, 0] == np.where(labels == 0, 250, 5)).all()
        assert np.array_equal(images, found[1][f"{split}_images"])
