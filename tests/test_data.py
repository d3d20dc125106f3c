import hashlib
import http.server
import os
import pickle
import shutil
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from abdlab.data import DATASETS, augment, load, pick_device, to_unit

SPLITS = ("train", "test")


def paint(path: Path, color, size=(8, 8), mode="RGB"):
    """One image file of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def tree(tmp_path):
    """train/ and test/ with the classes cat (red) and dog (green), in several formats
    and sizes.
    """
    root = tmp_path / "pets"
    for split in SPLITS:
        paint(root / split / "dog" / "a.png", (0, 255, 0), (5, 9))
        paint(root / split / "cat" / "a.png", (255, 0, 0))
        paint(root / split / "cat" / "b.JPEG", (255, 0, 0), (20, 10))
        (root / split / "cat" / "notes.txt").write_text("not an image")
    return root


def cpu(name, root="data", **options):
    return load(name, root, device="cpu", **options)


def complaint(name, root, **options):
    """The one sentence that loading fails with; no file of the user's is gone or
    changed.
    """
    before = contents(root)
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        cpu(name, root, **options)
    after = contents(root)
    assert {path: after[path] for path in before} == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def contents(root):
    return {
        str(p): p.read_bytes()
        for p in sorted(Path(root).rglob("*"))
        if p.is_file() and not p.name.startswith(".abdlab")
    }


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


class Breaking(Quiet):
    """Promises the whole file, sends half of it and hangs up."""

    def copyfile(self, source, outputfile):
        data = source.read()
        outputfile.write(data[: len(data) // 2])
        self.close_connection = True


@pytest.fixture
def serve(tmp_path_factory, monkeypatch):
    """``serve(handler)``: (folder, its http address on this machine); torchvision's own
    download code gets files from there.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(handler=Quiet, folder=None):
        folder = folder or tmp_path_factory.mktemp("www")
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(handler, directory=str(folder))
        )
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return folder, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def closed_port():
    """An address on this machine where nobody answers."""
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        return f"http://127.0.0.1:{server.server_port}"


class TestDigits:
    def test_shapes_ranges_and_types(self):
        data = cpu("digits")
        assert data.train_images.shape == (1297, 1, 16, 16)
        assert data.test_images.shape == (500, 1, 16, 16)
        assert data.shape == (1, 16, 16)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        ):
            assert images.dtype == torch.float32
            assert 0 <= images.min() < images.max() <= 1
            assert labels.dtype == torch.int64
            assert labels.unique().tolist() == list(range(10))
        assert data.classes == tuple("0123456789")

    def test_is_the_same_every_time(self):
        first, second = cpu("digits"), cpu("digits")
        assert torch.equal(first.train_images, second.train_images)
        assert torch.equal(first.test_labels, second.test_labels)

    def test_mean_and_std_are_those_of_the_training_images(self):
        data = cpu("digits")
        assert data.mean == pytest.approx((data.train_images.mean().item(),), abs=1e-4)
        assert data.std == pytest.approx((data.train_images.std().item(),), abs=1e-4)

    def test_size(self):
        assert cpu("digits", size=8).shape == (1, 8, 8)

    def test_subset_takes_the_first_images(self):
        data = cpu("digits")
        part = data.subset(train=7, test=3)
        assert torch.equal(part.train_images, data.train_images[:7])
        assert torch.equal(part.test_labels, data.test_labels[:3])
        assert len(data.subset(test=3).train_images) == 1297


def test_an_unknown_name_gets_a_hint():
    with pytest.raises(ValueError, match="unknown data set 'digit': did you mean 'digits'"):
        load("digit")


def test_device_auto_is_a_device_and_a_name_is_that_device():
    assert isinstance(pick_device("auto"), torch.device)
    assert pick_device("cpu") == torch.device("cpu")


def test_to_unit_scales_bytes_and_passes_floats():
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx(
        [0, 0.2, 1]
    )
    assert to_unit(torch.tensor([0.25])).tolist() == [0.25]


class TestFolder:
    def test_classes_are_sorted_and_images_resized(self, tree):
        data = cpu(f"folder:{tree}", size=6)
        assert data.classes == ("cat", "dog")
        assert data.train_images.shape == data.test_images.shape == (3, 3, 6, 6)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        ):
            assert sorted(labels.tolist()) == [0, 0, 1]
            # cats are red, dogs are green: image and label stay together through the
            # shuffle
            assert images.mean(dim=(2, 3)).argmax(1).tolist() == labels.tolist()

    def test_the_default_size_is_32(self, tree):
        assert cpu(f"folder:{tree}").shape == (3, 32, 32)

    def test_grey_images_become_three_channels(self, tree):
        paint(tree / "train" / "dog" / "grey.png", 51, mode="L")
        data = cpu(f"folder:{tree}", size=8)
        assert any(torch.allclose(image, torch.tensor(0.2)) for image in data.train_images)

    def test_the_second_call_reads_the_cache(self, tree):
        first = cpu(f"folder:{tree}", size=6)
        assert len(list(tree.glob(".abdlab-*.npy"))) == 2
        for file in tree.rglob("*.png"):  # now undecodable, but of the same size and age
            stat = file.stat()
            file.write_bytes(b"x" * stat.st_size)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        second = cpu(f"folder:{tree}", size=6)
        assert torch.equal(first.train_images, second.train_images)
        assert torch.equal(first.test_images, second.test_images)

    def test_a_changed_file_is_decoded_again(self, tree):
        before = cpu(f"folder:{tree}", size=6)
        paint(tree / "train" / "dog" / "a.png", (0, 0, 255), (7, 7))
        after = cpu(f"folder:{tree}", size=6)
        dog = after.train_images[after.train_labels == 1]
        assert dog.mean(dim=(2, 3)).argmax(1).tolist() == [2]
        assert torch.equal(before.test_images, after.test_images)

    def test_no_half_written_cache_is_left(self, tree):
        cpu(f"folder:{tree}", size=6)
        assert not list(tree.glob("*.tmp")) + list(tree.glob(".*.tmp"))

    def test_garbage_instead_of_an_image(self, tree):
        (tree / "train" / "dog" / "bad.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"bad\.png is not a readable image"):
            cpu(f"folder:{tree}")

    @pytest.mark.parametrize("name", ["noise.png", "noise.jpg"])
    def test_a_truncated_image(self, tree, name):
        file = tree / "train" / "dog" / name
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"{name} is not a readable image"):
            cpu(f"folder:{tree}")

    def test_a_png_broken_in_its_middle(self, tree):
        file = tree / "train" / "dog" / "noise.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file)
        data = file.read_bytes()
        begin = data.index(b"IDAT")
        # the length of the first data chunk is wrong, so that the next chunk's name is
        # noise
        file.write_bytes(data[: begin - 4] + (100).to_bytes(4, "big") + data[begin:])
        with pytest.raises(ValueError, match=r"noise\.png is not a readable image"):
            cpu(f"folder:{tree}")

    @pytest.mark.parametrize("split", SPLITS)
    def test_a_missing_split(self, tree, split):
        (tree / split).rename(tree / "elsewhere")
        with pytest.raises(FileNotFoundError, match=f"{split} is not a folder: folder:PATH needs"):
            cpu(f"folder:{tree}")

    @pytest.mark.parametrize("split", SPLITS)
    def test_a_split_without_images(self, tree, split):
        for file in (tree / split).rglob("*.*"):
            file.unlink()
        with pytest.raises(ValueError, match=f"has no images in its {split} split"):
            cpu(f"folder:{tree}")

    def test_a_class_that_only_the_test_split_has(self, tree):
        paint(tree / "test" / "eel" / "a.png", (1, 2, 3))
        with pytest.raises(ValueError, match="test has classes that train/ has not: eel"):
            cpu(f"folder:{tree}")

    def test_no_path(self):
        with pytest.raises(ValueError, match="folder: needs a path"):
            load("folder:")


class TestCifar10:
    @pytest.fixture
    def archive(self, tmp_path, monkeypatch):
        """cifar-10-batches-py as it lies on disk, two images per batch: batch i holds
        the bytes i, label i (test: 0).
        """
        from torchvision.datasets import CIFAR10

        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()

        def put(name, content):
            data = pickle.dumps(content)
            (folder / name).write_bytes(data)
            return [name, hashlib.md5(data).hexdigest()]

        def batch(value):
            return {"data": np.full((2, 3072), value, np.uint8), "labels": [value, value]}

        names = [
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ]
        # torchvision verifies the real archive's checksums; these are the tiny one's
        monkeypatch.setattr(
            CIFAR10, "train_list", [put(f"data_batch_{i}", batch(i)) for i in range(1, 6)]
        )
        monkeypatch.setattr(CIFAR10, "test_list", [put("test_batch", batch(0))])
        meta = put("batches.meta", {"label_names": names})
        monkeypatch.setattr(
            CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
        )
        return tmp_path

    def test_reads_the_batches(self, archive):
        data = cpu("cifar10", archive)
        assert data.train_images.shape == (10, 3, 32, 32)
        assert data.test_images.shape == (2, 3, 32, 32)
        assert data.train_labels.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert torch.allclose(
            data.train_images.mean(dim=(1, 2, 3)) * 255, data.train_labels.float()
        )
        assert data.classes[3] == "cat"
        assert data.flip

    def test_channels_come_first(self, archive):
        image = np.repeat(
            np.array([10, 20, 30], np.uint8), 1024
        )  # the format: 1024 red, 1024 green, 1024 blue
        path = archive / "cifar-10-batches-py" / "test_batch"
        path.write_bytes(pickle.dumps({"data": image[None], "labels": [7]}))
        from torchvision.datasets import CIFAR10

        CIFAR10.test_list[0][1] = hashlib.md5(path.read_bytes()).hexdigest()
        data = cpu("cifar10", archive)
        assert (data.test_images[0].mean(dim=(1, 2)) * 255).tolist() == pytest.approx(
            [10, 20, 30], abs=1e-3
        )

    def test_resizes(self, archive):
        data = cpu("cifar10", archive, size=8)
        assert data.shape == (3, 8, 8)
        assert torch.allclose(
            data.train_images.mean(dim=(1, 2, 3)) * 255, data.train_labels.float()
        )

    def test_nothing_there(self, tmp_path):
        assert (
            complaint("cifar10", tmp_path)
            == f"CIFAR-10 is missing or incomplete under {tmp_path} (there is no"
            " cifar-10-batches-py in it): pass download=True, or root= of a folder that holds a"
            " whole cifar-10-batches-py"
        )

    @pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
    def test_one_file_is_missing(self, archive, name):
        (archive / "cifar-10-batches-py" / name).unlink()
        assert f"(cifar-10-batches-py lacks {name}): pass download=True" in complaint(
            "cifar10", archive
        )

    @pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
    @pytest.mark.parametrize("part", [0, 0.5])
    def test_a_damaged_file(self, archive, name, part):
        file = archive / "cifar-10-batches-py" / name
        file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
        assert (
            f"({name} in cifar-10-batches-py: the md5 sum is wrong): pass download=True"
            in complaint("cifar10", archive)
        )

    def test_a_damaged_file_is_never_unpickled(self, archive):
        class Bomb:
            def __reduce__(self):
                return (open, (str(archive / "exploded"), "w"))

        (archive / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
        complaint("cifar10", archive)
        assert not (archive / "exploded").exists()

    def test_many_faults_are_one_sentence(self, archive):
        folder = archive / "cifar-10-batches-py"
        for i in range(1, 6):
            (folder / f"data_batch_{i}").unlink()
        (folder / "test_batch").write_bytes(b"damaged")
        said = complaint("cifar10", archive)
        assert (
            "lacks data_batch_1, data_batch_2, data_batch_3 and 2 more; test_batch in"
            " cifar-10-batches-py: the md5" in said
        )


class TestCifar10Download:
    """torchvision's real download and extraction, from a server on this machine."""

    archive = TestCifar10.archive

    @pytest.fixture
    def www(self, archive, serve, monkeypatch):
        """The tiny archive as cifar-10-python.tar.gz on a server; nothing unpacked."""
        from torchvision.datasets import CIFAR10

        folder, address = serve()
        packed = folder / CIFAR10.filename
        with tarfile.open(packed, "w:gz") as tar:
            tar.add(archive / CIFAR10.base_folder, CIFAR10.base_folder)
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{CIFAR10.filename}")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
        return packed

    def elsewhere(self, monkeypatch, address):
        from torchvision.datasets import CIFAR10

        monkeypatch.setattr(CIFAR10, "url", f"{address}/{CIFAR10.filename}")

    def test_into_an_empty_folder(self, archive, www, tmp_path):
        data = cpu("cifar10", tmp_path / "new" / "data", download=True)
        assert torch.equal(data.train_images, cpu("cifar10", archive).train_images)
        assert data.test_labels.tolist() == [0, 0]

    @pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"damaged")])
    def test_mends_what_is_missing_or_damaged(self, archive, www, name, damage):
        before = contents(archive)
        (archive / "notes.txt").write_text("the user's own")
        damage(archive / "cifar-10-batches-py" / name)
        assert cpu("cifar10", archive, download=True).train_labels.tolist() == [
            1,
            1,
            2,
            2,
            3,
            3,
            4,
            4,
            5,
            5,
        ]
        after = contents(archive)
        assert {path: after[path] for path in before} == before
        assert (archive / "notes.txt").read_text() == "the user's own"

    def test_a_whole_copy_needs_no_net(self, archive, www, monkeypatch):
        self.elsewhere(monkeypatch, closed_port())
        assert len(cpu("cifar10", archive, download=True).train_images) == 10

    def test_an_archive_that_is_not_unpacked(self, www, tmp_path, monkeypatch):
        root = tmp_path / "new"
        root.mkdir()
        shutil.copy(www, root)
        assert (
            "(there is no cifar-10-batches-py in it; cifar-10-python.tar.gz is not unpacked)"
            in complaint("cifar10", root)
        )
        self.elsewhere(monkeypatch, closed_port())
        assert len(cpu("cifar10", root, download=True).train_images) == 10

    def test_half_an_archive(self, www, tmp_path):
        root = tmp_path / "new"
        root.mkdir()
        (root / www.name).write_bytes(www.read_bytes()[: www.stat().st_size // 2])
        assert "; cifar-10-python.tar.gz is half-downloaded or damaged)" in complaint(
            "cifar10", root
        )
        assert len(cpu("cifar10", root, download=True).train_images) == 10

    @pytest.mark.parametrize("why", ["unreachable", "not there"])
    def test_no_server_or_no_file(self, archive, www, monkeypatch, why):
        (archive / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
        (archive / www.name).write_bytes(b"half")
        if why == "unreachable":
            self.elsewhere(monkeypatch, closed_port())
        else:
            www.unlink()
        said = complaint("cifar10", archive, download=True)
        assert f"CIFAR-10 could not be downloaded to {archive} (" in said
        assert ("refused" if why == "unreachable" else "HTTP Error 404") in said
        assert said.endswith(
            "): try again, or pass root= of a folder that holds a whole cifar-10-batches-py"
        )

    def test_a_download_that_breaks_can_be_tried_again(self, www, serve, tmp_path, monkeypatch):
        from torchvision.datasets import CIFAR10

        root, good = tmp_path / "new", CIFAR10.url
        self.elsewhere(monkeypatch, serve(Breaking, www.parent)[1])
        said = complaint("cifar10", root, download=True)
        assert "could not be downloaded" in said
        assert not (root / "cifar-10-batches-py").exists()  # half an archive is never unpacked
        monkeypatch.setattr(CIFAR10, "url", good)
        assert len(cpu("cifar10", root, download=True).train_images) == 10

    def test_another_archive_is_not_unpacked(self, www, tmp_path):
        www.write_bytes(b"something else")
        said = complaint("cifar10", tmp_path / "new", download=True)
        assert "cifar-10-python.tar.gz is half-downloaded or damaged): try again" in said

    def test_a_root_that_is_a_file(self, www, tmp_path):
        (tmp_path / "file").write_text("mine")
        said = complaint("cifar10", tmp_path / "file", download=True)
        assert f"CIFAR-10 could not be downloaded to {tmp_path / 'file'} (" in said
        assert (tmp_path / "file").read_text() == "mine"


class TestGTSRB:
    @pytest.fixture
    def archive(self, tmp_path):
        """gtsrb/ as it lies on disk, two images per class: the red value is five times
        the label.
        """
        base = tmp_path / "gtsrb"
        head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
        for label in range(43):
            rows = [head]
            for track in range(2):
                name = f"00000_{track:05d}.ppm"
                paint(
                    base / f"GTSRB/Training/{label:05d}" / name,
                    (5 * label, 0, 100),
                    (15 + label % 3, 20),
                )
                rows.append(f"{name};15;20;5;5;10;15;{label}")
            (base / f"GTSRB/Training/{label:05d}/GT-{label:05d}.csv").write_text(
                "\n".join(rows) + "\n"
            )
        rows = [head]
        for i, label in enumerate((2, 0, 42)):
            paint(base / f"GTSRB/Final_Test/Images/{i:05d}.ppm", (5 * label, 0, 100), (16, 16))
            rows.append(f"{i:05d}.ppm;16;16;1;1;15;15;{label}")
        (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
        return tmp_path

    @staticmethod
    def seen(images):
        """The labels that the pictures show."""
        return (images[:, 0].mean(dim=(1, 2)) * 51).round().int().tolist()

    def test_reads_images_with_their_labels(self, archive):
        data = cpu("gtsrb", archive)
        assert data.train_images.shape == (86, 3, 32, 32)
        assert sorted(data.train_labels.tolist()) == sorted([*range(43)] * 2)
        assert sorted(data.test_labels.tolist()) == [0, 2, 42]
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        ):
            assert self.seen(images) == labels.tolist()
        assert data.classes == tuple(map(str, range(43)))
        assert not data.flip

    def test_decodes_once(self, archive):
        first = cpu("gtsrb", archive, size=8)
        for file in archive.rglob("*.ppm"):
            stat = file.stat()
            file.write_bytes(b"x" * stat.st_size)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert torch.equal(cpu("gtsrb", archive, size=8).train_images, first.train_images)

    def test_root_may_begin_at_home(self, archive, monkeypatch):
        monkeypatch.setenv("HOME", str(archive))
        assert len(cpu("gtsrb", "~").test_images) == 3

    def test_nothing_there(self, tmp_path):
        assert (
            complaint("gtsrb", tmp_path)
            == f"GTSRB is missing or incomplete under {tmp_path} (there is no gtsrb/GTSRB/Training"
            " in it): pass download=True, or root= of a folder that holds a whole gtsrb"
        )

    def test_half_an_archive(self, tmp_path):
        (tmp_path / "gtsrb").mkdir()
        (tmp_path / "gtsrb" / "GTSRB-Training_fixed.zip").write_bytes(b"PK\x03\x04 and no end")
        (tmp_path / "gtsrb" / "GTSRB_Final_Test_GT.zip").write_bytes(b"of no matter here")
        said = complaint("gtsrb", tmp_path)
        assert (
            "Training in it; GTSRB-Training_fixed.zip is half-downloaded or damaged): pass" in said
        )

    def test_half_an_unpacking(self, archive):
        for label in range(1, 43):
            shutil.rmtree(archive / f"gtsrb/GTSRB/Training/{label:05d}")
        said = complaint("gtsrb", archive)
        assert (
            "(42 of the 43 class folders are not in Training: 00001, 00002, 00003 and 39 more)"
            in said
        )

    def test_a_class_folder_without_images(self, archive):
        for file in (archive / "gtsrb/GTSRB/Training/00007").glob("*.ppm"):
            file.unlink()
        assert "(the class folder 00007 holds no .ppm image)" in complaint("gtsrb", archive)

    def test_a_folder_that_is_no_class(self, archive):
        paint(archive / "gtsrb/GTSRB/Training/00001_old/00000_00000.ppm", (0, 0, 0))
        said = complaint("gtsrb", archive)
        assert (
            "has folders that are no class of GTSRB: 00001_old (the classes are 00000 to 00042;"
            " move" in said
        )

    def test_a_training_image_is_missing(self, archive):
        (archive / "gtsrb/GTSRB/Training/00007/00000_00001.ppm").unlink()
        assert "(GT-00007.csv lists images that are not there: 00000_00001.ppm)" in complaint(
            "gtsrb", archive
        )

    def test_a_test_image_is_missing(self, archive):
        (archive / "gtsrb/GTSRB/Final_Test/Images/00001.ppm").unlink()
        assert "(GT-final_test.csv lists images that are not there: 00001.ppm)" in complaint(
            "gtsrb", archive
        )

    @pytest.mark.parametrize(
        "name", ["Training/00007/00000_00001.ppm", "Final_Test/Images/00001.ppm"]
    )
    @pytest.mark.parametrize("part", [0, 0.01, 0.5])
    def test_a_truncated_image(self, archive, name, part):
        file = archive / "gtsrb/GTSRB" / name
        file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
        said = complaint("gtsrb", archive)
        assert f"{file} is not a readable image (" in said
        assert said.endswith("): delete that file and pass download=True")

    def test_no_table_of_test_labels(self, archive):
        (archive / "gtsrb" / "GT-final_test.csv").unlink()
        assert (
            "(there is no GT-final_test.csv, which holds the labels of the test images)"
            in complaint("gtsrb", archive)
        )

    def test_half_a_table_of_test_labels(self, archive):
        table = archive / "gtsrb" / "GT-final_test.csv"
        table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))
        said = complaint("gtsrb", archive)
        assert "(GT-final_test.csv lists 1 of 3 test images and lacks 00001.ppm, 00002.ppm)" in said

    @pytest.mark.parametrize("label", ["43", "-1", "two", "", "1.0"])
    def test_a_wrong_label(self, archive, label):
        table = archive / "gtsrb" / "GT-final_test.csv"
        table.write_text(table.read_text().replace(";0\n", f";{label}\n"))
        said = complaint("gtsrb", archive)
        assert (
            "(line 3 of GT-final_test.csv must have a Filename and a ClassId from 0 to 42, not "
            in said
        )
        assert f"not '00001.ppm' and {label!r})" in said

    def test_a_line_that_breaks_off(self, archive):
        table = archive / "gtsrb" / "GT-final_test.csv"
        table.write_text(table.read_text()[:-15])
        assert "line 4 of GT-final_test.csv must have a Filename and a ClassId" in complaint(
            "gtsrb", archive
        )

    @pytest.mark.parametrize(
        "content",
        [b"", b"Filename,ClassId\n00000.ppm,2\n", b"\xff\xfe\x00\x00", b"Filename;Width\na;1\n"],
    )
    def test_no_such_table(self, archive, content):
        (archive / "gtsrb" / "GT-final_test.csv").write_bytes(content)
        said = complaint("gtsrb", archive)
        assert (
            "(GT-final_test.csv must have the columns Filename and ClassId, separated by"
            " semicolons)" in said
        )


class TestGTSRBDownload:
    """torchvision's real download and extraction, from a server on this machine."""

    archive, seen = TestGTSRB.archive, staticmethod(TestGTSRB.seen)

    @pytest.fixture
    def www(self, archive, serve, tmp_path, monkeypatch):
        """The three zip files on a server. torchvision has their addresses and
        checksums in its code: they are redirected.
        """
        from torchvision.datasets import gtsrb
        from torchvision.datasets.utils import download_and_extract_archive

        self.folder, self.address = serve()
        base = archive / "gtsrb"
        for name, root, part in (
            ("GTSRB-Training_fixed", base, "GTSRB/Training"),
            ("GTSRB_Final_Test_Images", base, "GTSRB/Final_Test"),
            ("GTSRB_Final_Test_GT", base, "GT-final_test.csv"),
        ):
            shutil.make_archive(str(self.folder / name), "zip", root, part)
        sums = {
            path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in self.folder.iterdir()
        }
        assert len(sums) == 3

        def local(url, **options):
            name = url.rsplit("/", 1)[1]
            download_and_extract_archive(f"{self.address}/{name}", **{**options, "md5": sums[name]})

        monkeypatch.setattr(gtsrb, "download_and_extract_archive", local)
        return self.folder

    def test_into_an_empty_folder(self, archive, www, tmp_path):
        data = cpu("gtsrb", tmp_path / "new", download=True)
        assert torch.equal(data.train_images, cpu("gtsrb", archive).train_images)
        assert self.seen(data.test_images) == data.test_labels.tolist()

    @pytest.mark.parametrize(
        "lost", ["GTSRB/Training/00007", "GTSRB/Final_Test/Images/00001.ppm", "GT-final_test.csv"]
    )
    def test_completes_half_an_unpacking(self, archive, www, lost):
        before = contents(archive)
        path = archive / "gtsrb" / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (archive / "gtsrb" / "notes.txt").write_text("the user's own")
        data = cpu("gtsrb", archive, download=True)
        assert (len(data.train_images), len(data.test_images)) == (86, 3)
        after = contents(archive)
        assert {path: after[path] for path in before} == before
        assert (archive / "gtsrb" / "notes.txt").read_text() == "the user's own"

    def test_a_truncated_image_is_mended_as_the_sentence_says(self, archive, www):
        file = archive / "gtsrb/GTSRB/Training/00007/00000_00001.ppm"
        file.write_bytes(file.read_bytes()[:20])
        assert "delete that file and pass download=True" in complaint("gtsrb", archive)
        file.unlink()
        data = cpu("gtsrb", archive, download=True)
        assert self.seen(data.train_images) == data.train_labels.tolist()

    def test_half_an_archive_is_fetched_again(self, www, tmp_path):
        name, base = "GTSRB-Training_fixed.zip", tmp_path / "new" / "gtsrb"
        base.mkdir(parents=True)
        (base / name).write_bytes((www / name).read_bytes()[:1000])
        assert f"; {name} is half-downloaded or damaged): pass download=True" in complaint(
            "gtsrb", base.parent
        )
        assert len(cpu("gtsrb", base.parent, download=True).train_images) == 86

    def test_a_whole_copy_needs_no_net(self, archive, www):
        self.address = closed_port()
        assert len(cpu("gtsrb", archive, download=True).train_images) == 86

    @pytest.mark.parametrize("why", ["unreachable", "not there"])
    def test_no_server_or_no_file(self, archive, www, why):
        shutil.rmtree(archive / "gtsrb/GTSRB/Training/00007")
        if why == "unreachable":
            self.address = closed_port()
        else:
            (www / "GTSRB-Training_fixed.zip").unlink()
        said = complaint("gtsrb", archive, download=True)
        assert f"GTSRB could not be downloaded to {archive} (" in said
        assert ("refused" if why == "unreachable" else "HTTP Error 404") in said

    def test_a_download_that_breaks_can_be_tried_again(self, www, serve, tmp_path):
        root, good = tmp_path / "new", self.address
        self.address = serve(Breaking, www)[1]
        said = complaint("gtsrb", root, download=True)
        assert "GTSRB could not be downloaded" in said
        assert not (root / "gtsrb/GTSRB").exists()
        self.address = good
        assert len(cpu("gtsrb", root, download=True).train_images) == 86


class TestAugment:
    images = torch.rand(24, 2, 5, 7, generator=torch.Generator().manual_seed(3)) + 0.1

    @staticmethod
    def rng(seed=0):
        return torch.Generator().manual_seed(seed)

    @staticmethod
    def shifts(image, shift):
        """All zero-padded shifts of one image, written out."""
        channels, height, width = image.shape
        for down in range(-shift, shift + 1):
            for right in range(-shift, shift + 1):
                moved = torch.zeros_like(image)
                for c in range(channels):
                    for y in range(height):
                        for x in range(width):
                            if 0 <= y - down < height and 0 <= x - right < width:
                                moved[c, y, x] = image[c, y - down, x - right]
                yield moved

    def test_nothing_asked_is_the_identity(self):
        assert torch.equal(augment(self.images, 0, False, self.rng()), self.images)

    @pytest.mark.parametrize("shift", [1, 2])
    def test_every_image_is_one_of_its_shifts(self, shift):
        before, seen = self.images.clone(), set()
        out = augment(self.images, shift, False, self.rng())
        assert out.shape == self.images.shape
        for original, result in zip(self.images, out, strict=True):
            matches = [
                i
                for i, candidate in enumerate(self.shifts(original, shift))
                if torch.equal(candidate, result)
            ]
            assert len(matches) == 1
            seen.update(matches)
        assert len(seen) > (2 * shift + 1)  # images move independently, in both directions
        assert torch.equal(self.images, before)

    def test_a_flip_only_mirrors(self):
        out = augment(self.images, 0, True, self.rng())
        same = [torch.equal(a, b) for a, b in zip(out, self.images, strict=True)]
        mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(out, self.images, strict=True)]
        assert all(a != b for a, b in zip(same, mirrored, strict=True))
        assert 4 <= sum(mirrored) <= 20

    def test_the_same_seed_gives_the_same_images(self):
        first = augment(self.images, 2, True, self.rng(5))
        assert torch.equal(first, augment(self.images, 2, True, self.rng(5)))
        assert not torch.equal(first, augment(self.images, 2, True, self.rng(6)))

    def test_digits_and_signs_are_never_mirrored(self):
        assert not cpu("digits").flip
        assert {name: flip for name, (_, _, flip) in DATASETS.items()} == {
            "digits": False,
            "cifar10": True,
            "gtsrb": False,
            "folder": True,
        }
