import hashlib
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from abdlab import distill_all, folder_of, load_model, settings
from abdlab.data import DATASETS, augment, load, pick_device, to_unit
from abdlab.folders import IMAGE_SUFFIXES

ROOT = Path(__file__).parents[1]

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

    def test_images_and_split_are_scikit_learns(self):
        bunch = load_digits()
        train, test = train_test_split(
            range(1797), test_size=500, random_state=0, stratify=bunch.target
        )
        data = cpu("digits", size=8)  # their own size: nothing is interpolated
        for rows, images, labels in (
            (train, data.train_images, data.train_labels),
            (test, data.test_images, data.test_labels),
        ):
            assert torch.equal(images[:, 0], torch.from_numpy(bunch.images[rows] / 16).float())
            assert labels.tolist() == bunch.target[rows].tolist()

    def test_are_the_same_where_scikit_learns_file_is_not_found(self, monkeypatch):
        first = cpu("digits")
        monkeypatch.setattr("abdlab.data.find_spec", lambda name: None)
        second = cpu("digits")
        assert torch.equal(first.train_images, second.train_images)
        assert torch.equal(first.test_labels, second.test_labels)

    def test_do_not_import_scikit_learn(self):  # which takes a second
        code = "import sys, abdlab; abdlab.load('digits'); assert 'sklearn' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

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


def said(name, **options):
    """The data set, and the one sentence that loading warns with."""
    with pytest.warns(UserWarning, match="left out|found no") as caught:
        data = cpu(name, **options)
    assert len(caught) == 1
    return data, str(caught[0].message)


class TestWhatIsAClass:
    @pytest.fixture
    def tree(self, tree):
        for file in tree.rglob("*.txt"):
            file.unlink()
        return tree

    def test_nothing_left_out_says_nothing(self, tree, recwarn):
        cpu(f"folder:{tree}")
        assert not [w for w in recwarn if "left out" in str(w.message)]

    @pytest.mark.parametrize(
        "name", [".ipynb_checkpoints", "__MACOSX", "$RECYCLE.BIN", "lost+found", "@eaDir", ".git"]
    )
    @pytest.mark.parametrize("full", [True, False])
    def test_hidden_and_system_folders_are_none(self, tree, name, full):
        before = cpu(f"folder:{tree}", size=6)
        for split in SPLITS:
            (tree / split / name).mkdir()
            if full:
                paint(tree / split / name / "a" / "b.png", (0, 0, 255))
        if full:
            data, message = said(f"folder:{tree}", size=6)
            assert message == f"{tree}: left out 2 files (2 in hidden or system folders)"
        else:
            data = cpu(f"folder:{tree}", size=6)
        assert data.classes == ("cat", "dog")
        assert torch.equal(data.train_images, before.train_images)
        assert torch.equal(data.test_labels, before.test_labels)

    @pytest.mark.parametrize("split", SPLITS)
    def test_an_empty_class_is_named(self, tree, split):
        (tree / "train" / "ant").mkdir()
        (tree / split / "ant").mkdir(exist_ok=True)
        if split == "test":
            paint(tree / "train" / "ant" / "a.png", (1, 2, 3))
        with pytest.raises(ValueError, match=rf"{split} has classes without images: ant \(fill"):
            cpu(f"folder:{tree}")

    def test_a_class_that_holds_only_what_is_not_read(self, tree):
        for split in SPLITS:
            (tree / split / "ant").mkdir()
            (tree / split / "ant" / "a.svg").write_text("<svg/>")
            (tree / split / "ant" / ".a.png").write_bytes(b"hidden")
        with pytest.raises(ValueError, match="train has classes without images: ant"):
            cpu(f"folder:{tree}")

    def test_a_class_without_a_test_folder_is_said(self, tree):
        paint(tree / "train" / "ant" / "a.png", (0, 0, 255))
        data, message = said(f"folder:{tree}", size=6)
        assert message == f"{tree}: found no test images of ant"
        assert data.classes == ("ant", "cat", "dog")
        assert sorted(data.test_labels.tolist()) == [1, 1, 2]
        hue = data.test_images.mean(dim=(2, 3)).argmax(1)  # cats are red, dogs are green
        assert (hue + 1).tolist() == data.test_labels.tolist()

    def test_how_many_files_were_left_out_and_why(self, tree):
        for name in ("a.txt", "b.txt", "c.psd", "README", ".DS_Store", "Thumbs.db"):
            (tree / "train" / "cat" / name).write_text("no image")
        (tree / "train" / "cat" / "gone.png").symlink_to(tree / "nowhere.png")
        paint(tree / "train" / "stray.png", (0, 0, 255))
        paint(tree / "train" / "cat" / "sub" / ".trash" / "a.png", (0, 0, 255))
        data, message = said(f"folder:{tree}", size=6)
        assert len(data.train_images) == 3
        assert message.startswith(f"{tree}: left out 9 files (2 ")
        for reason in (
            "2 of the kind .txt",
            "2 hidden",
            "1 of the kind .psd",
            "1 of the kind without a suffix",
            "1 links to nothing",
            "1 in hidden or system folders",
        ):
            assert reason in message
        assert message.endswith(", and others)")  # the stray image in no class folder
        assert "\n" not in message

    def test_images_in_folders_below_a_class(self, tree):
        paint(tree / "train" / "dog" / "2024" / "may" / "deep.png", (0, 0, 255))
        data = cpu(f"folder:{tree}", size=6)
        assert sorted(data.train_labels.tolist()) == [0, 0, 1, 1]
        dogs = data.train_images[data.train_labels == 1].mean(dim=(2, 3)).argmax(1)
        assert sorted(dogs.tolist()) == [1, 2]

    def test_links_that_lead_back_end(self, tree):
        (tree / "train" / "dog" / "again").symlink_to(tree / "train" / "dog")
        (tree / "train" / "dog" / "up").symlink_to(tree / "train")
        data = cpu(f"folder:{tree}", size=6)
        assert data.train_labels.tolist().count(1) >= 1
        assert len(data.train_images) <= 6


class TestImageFiles:
    """Every kind of file with its right values, from a class of one image."""

    @pytest.fixture
    def read(self, tmp_path):
        """``read(name, size)``: what folder: makes of the file that ``write`` wrote."""

        def go(name, write, size=16):
            root = tmp_path / name
            for split in SPLITS:
                (root / split / "one").mkdir(parents=True)
                write(root / split / "one" / name)
            return cpu(f"folder:{root}", size=size).train_images[0] * 255

        return go

    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)

    @staticmethod
    def tiff(path, values, *, big=False, bits, kind=1, photometric=1):
        """A grey TIFF with one strip, written by hand: any width, byte order and sign."""
        import struct

        order = ">" if big else "<"
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()
        height, width = values.shape
        entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1)]
        entries += [(262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, height)]
        entries += [(279, 4, len(data)), (339, 3, kind)]
        table = struct.pack(order + "H", len(entries))
        for tag, typ, value in entries:
            inline = struct.pack(order + ("I" if typ == 4 else "HH"), *(value, 0)[: 5 - typ])
            table += struct.pack(order + "HHI", tag, typ, 1) + inline
        head = (b"MM\0*" if big else b"II*\0") + struct.pack(order + "I", 8 + len(data))
        path.write_bytes(head + data + table + struct.pack(order + "I", 0))

    @pytest.mark.parametrize("size", [256, 64])
    @pytest.mark.parametrize("name", ["a.png", "a.pgm", "a.tif", "a.TIFF", "big.tif", "high.pgm"])
    def test_a_16_bit_ramp(self, read, name, size):
        def write(path):
            if path.name == "big.tif":
                self.tiff(path, self.ramp, big=True, bits=16)
            elif path.name == "high.pgm":
                head = b"P5 256 256 65535\n"
                path.write_bytes(head + self.ramp.astype(">u2").tobytes())
            else:
                Image.fromarray(self.ramp).save(path)

        seen = read(name, write, size)
        assert seen.mean().item() == pytest.approx(127.5, abs=0.1)
        assert torch.equal(seen[0], seen[1])
        if size == 256:
            right = torch.from_numpy((self.ramp / 257.0).round().astype(np.float32))
            assert (seen[0] - right).abs().max() <= 1  # .5 may round either way
            assert len(seen.round().unique()) == 256

    @pytest.mark.parametrize("big", [True, False])
    @pytest.mark.parametrize(
        ("values", "bits", "kind"),
        [
            (ramp.astype(np.uint32) * 65537, 32, 1),
            (ramp.astype(np.int32) * 32768, 32, 2),
            ((ramp / 65535).astype(np.float32), 32, 3),
            (ramp, 16, 1),
        ],
        ids=["uint32", "int32", "float32", "uint16"],
    )
    def test_grey_tiffs_by_hand(self, read, big, values, bits, kind):
        if big and values.dtype == np.uint32:  # Pillow has no decoder for these
            with pytest.raises(ValueError, match=r"a\.tif is not a readable image"):
                read("a.tif", lambda p: self.tiff(p, values, big=big, bits=bits, kind=kind), 256)
            return
        seen = read("a.tif", lambda p: self.tiff(p, values, big=big, bits=bits, kind=kind), 256)
        assert seen.mean().item() == pytest.approx(127.5, abs=0.1)
        assert len(seen.round().unique()) == 256

    def test_a_tiff_that_counts_from_white_to_black(self, read):
        values = np.full((4, 4), 65535 // 4, np.uint16)
        seen = read("a.tif", lambda p: self.tiff(p, values, bits=16, photometric=0), 4)
        assert seen.mean().item() == pytest.approx(191, abs=1)

    @pytest.mark.parametrize("wrong", [2.0, -0.5, float("nan")])
    def test_floats_outside_the_unit_interval_are_refused(self, read, wrong):
        values = np.full((4, 4), wrong, np.float32)
        with pytest.raises(ValueError, match=r"a\.tif is not a readable image \(its grey values"):
            read("a.tif", lambda p: self.tiff(p, values, bits=32, kind=3))

    @pytest.mark.parametrize(
        "name",
        [
            *("a.jpg", "a.jpeg", "a.JPE", "a.jfif", "a.png", "a.PNG", "a.ppm", "a.pgm", "a.pnm"),
            *("a.pbm", "a.bmp", "a.dib", "a.tif", "a.TIFF", "a.webp", "a.gif", "a.tga"),
        ],
    )
    def test_every_format(self, read, name):
        def write(path):
            kind = {"pgm": "L", "pbm": "1"}.get(path.suffix[1:], "RGB")
            Image.new("RGB", (8, 8), (255, 255, 255)).convert(kind).save(path)

        assert read(name, write, 8).min() >= 253

    def test_torchvisions_formats_are_all_read(self):
        from torchvision.datasets.folder import IMG_EXTENSIONS

        assert set(IMG_EXTENSIONS) <= set(IMAGE_SUFFIXES)

    def test_of_an_animation_the_first_picture(self, read):
        def write(path):
            first, second = (Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 0, 255)))
            first.save(path, save_all=True, append_images=[second])

        assert read("a.gif", write, 8).mean(dim=(1, 2)).tolist() == [255, 0, 0]

    @pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.tga"])
    def test_what_is_transparent_is_black(self, read, name):
        def write(path):
            pixels = np.zeros((8, 8, 4), np.uint8)
            pixels[..., 0] = 200  # red everywhere, also where nobody sees it
            pixels[:, 4:, 3] = 255
            options = {"lossless": True, "exact": True} if path.suffix == ".webp" else {}
            Image.fromarray(pixels).save(path, **options)

        seen = read(name, write, 8)
        assert seen[:, :, :4].abs().max() == 0
        assert seen[0, :, 4:].mean().item() == pytest.approx(200, abs=1)

    def test_half_transparent_and_palette(self, read):
        half = read("a.png", lambda p: Image.new("RGBA", (4, 4), (200, 100, 0, 128)).save(p), 4)
        assert half.mean(dim=(1, 2)).tolist() == pytest.approx([100, 50, 0], abs=1)

        def palette(path):
            image = Image.new("P", (4, 4), 1)
            image.putpalette([0, 0, 0, 10, 20, 30])
            image.save(path, transparency=1)

        assert read("b.png", palette, 4).abs().max() == 0

    @pytest.mark.parametrize("turn", range(1, 9))
    @pytest.mark.parametrize("name", ["a.jpg", "a.png", "deep.png"])
    def test_exif_rotation_is_applied(self, read, name, turn):
        upright = np.zeros((16, 16), np.uint8)
        upright[:8, :8], upright[:8, 8:] = 250, 120  # bright at the top left, then clockwise
        back = {  # how a camera stores it
            1: lambda x: x,
            2: np.fliplr,
            3: lambda x: np.rot90(x, 2),
            4: np.flipud,
            5: np.transpose,
            6: lambda x: np.rot90(x, 1),
            7: lambda x: np.rot90(x, 2).T,
            8: lambda x: np.rot90(x, -1),
        }[turn]

        def write(path):
            stored = back(upright)
            if path.name == "deep.png":
                stored = stored.astype(np.uint16) * 257
            exif = Image.Exif()
            exif[274] = turn
            Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)

        seen = read(name, write)
        corners = [seen[0, y, x].item() for y, x in ((3, 3), (3, 12), (12, 12), (12, 3))]
        assert corners == pytest.approx([250, 120, 0, 0], abs=4)

    def test_a_huge_png_ends_in_one_sentence(self, tree):
        import struct
        import zlib

        def chunk(name, data):
            return (
                struct.pack(">I", len(data)) + name + data
                + struct.pack(">I", zlib.crc32(name + data))
            )  # fmt: skip

        head = struct.pack(">IIBBBBB", 14000, 14000, 8, 0, 0, 0, 0)
        bomb = tree / "train" / "dog" / "bomb.png"
        bomb.write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) +
            chunk(b"IEND", b"")
        )  # fmt: skip
        assert "bomb.png has more than 179 megapixels" in complaint(f"folder:{tree}", tree)

    def test_an_image_that_pillow_only_warns_of_is_read(self, tree, monkeypatch, recwarn):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # the cat has 64 pixels
        monkeypatch.setattr("abdlab.folders.Image.MAX_IMAGE_PIXELS", 60)
        for name in ("train/cat/b.JPEG", "test/cat/b.JPEG"):
            (tree / name).unlink()
        assert len(cpu(f"folder:{tree}").train_images) == 2
        assert not [w for w in recwarn if w.category is Image.DecompressionBombWarning]

    def test_another_decoder_gets_no_file_to_see(self, tree):
        (tree / "train" / "dog" / "b.png").write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
        )
        assert "b.png is not a readable image" in complaint(f"folder:{tree}", tree)


class TestCacheOfDecodedImages:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[: len(data) // 2],
            lambda data: b"",
            lambda data: data[:20],
            lambda data: b"garbage" * 50,
            lambda data: data.replace(b"|u1", b"|i1"),
        ],
        ids=["half", "empty", "head", "garbage", "another type"],
    )
    def test_one_that_cannot_be_read_is_made_anew(self, tree, damage):
        first = cpu(f"folder:{tree}", size=6)
        caches = sorted(tree.glob(".abdlab-*"))
        whole = [cache.read_bytes() for cache in caches]
        for cache in caches:
            cache.write_bytes(damage(cache.read_bytes()))
        assert torch.equal(cpu(f"folder:{tree}", size=6).train_images, first.train_images)
        assert [cache.read_bytes() for cache in sorted(tree.glob(".abdlab-*"))] == whole

    def test_one_of_another_shape_is_made_anew(self, tree):
        first = cpu(f"folder:{tree}", size=6)
        for cache in tree.glob(".abdlab-*"):
            np.save(cache, np.zeros((1, 3, 6, 6), np.uint8))
        assert torch.equal(cpu(f"folder:{tree}", size=6).train_images, first.train_images)

    def test_one_that_holds_a_pickle_is_never_unpickled(self, tree, tmp_path):
        cpu(f"folder:{tree}", size=6)

        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        for cache in tree.glob(".abdlab-*"):
            np.save(cache, np.array([Bomb()], dtype=object), allow_pickle=True)
        cpu(f"folder:{tree}", size=6)
        assert not (tmp_path / "exploded").exists()

    def test_old_ones_are_removed(self, tree):
        cpu(f"folder:{tree}", size=6)
        cpu(f"folder:{tree}", size=8)
        before = set(tree.glob(".abdlab-*"))
        forgotten = tree / ".abdlab-train-6-0123456789abcdef.77.tmp"
        young = tree / ".abdlab-train-6-0123456789abcdef.78.tmp"
        for file in (forgotten, young):
            file.write_bytes(b"half")
        os.utime(forgotten, (0, 0))
        paint(tree / "train" / "dog" / "new.png", (0, 0, 255))
        cpu(f"folder:{tree}", size=6)
        after = set(tree.glob(".abdlab-*"))
        assert len([p for p in after if p.suffix == ".npy"]) == 4
        assert len(before & after) == 3  # the test split, and those of the other size
        assert young in after
        assert forgotten not in after

    def test_one_folder_has_one_cache_however_it_is_written(self, tree, monkeypatch):
        cpu(f"folder:{tree}", size=6)
        before = {p: p.stat().st_mtime_ns for p in tree.glob(".abdlab-*")}
        monkeypatch.chdir(tree.parent)
        monkeypatch.setenv("HOME", str(tree.parent))
        for name in (tree.name, f"./{tree.name}/../{tree.name}", f"~/{tree.name}"):
            cpu(f"folder:{name}", size=6)
        assert {p: p.stat().st_mtime_ns for p in tree.glob(".abdlab-*")} == before


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

    @pytest.mark.filterwarnings("ignore::abdlab.WeakTeacher")
    def test_from_its_files_to_a_defended_student(self, archive, tmp_path):
        tiny = {"data.root": str(archive), "teacher.model": "wrn-10-1", "teacher.width": 4}
        tiny |= {"teacher.epochs": 1, "teacher.batch_size": 16, "student.width": 4}
        tiny |= {"fastdfkd.rounds": 1, "fastdfkd.warmup": 1, "fastdfkd.kd_steps": 4}
        tiny |= {"fastdfkd.batch_size": 8, "fastdfkd.width": 4, "sv.verify": False, "sv.layers": 3}
        chosen = settings("paper/gtsrb/fastdfkd", tiny | {"sr.inner_steps": 1}, device="cpu")
        root, method = tmp_path / "run", "clp/fastdfkd+sv+sr"
        found = distill_all(root, chosen, chosen.dataset(), ["fastdfkd", method], with_teacher=True)
        assert list(found) == ["teacher", "fastdfkd", method]
        assert all(0 <= m[k] <= 1 for m in found.values() for k in ("acc", "asr"))
        assert found[method]["defenses"]["sr"]["from_pseudo_batch"] == 3
        student = load_model(folder_of(root, 0, method) / "student.safetensors")
        assert student(torch.rand(2, 3, 32, 32)).shape == (2, 43)

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
