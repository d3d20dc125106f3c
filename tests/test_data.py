import hashlib
import os
import pickle
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
    """train/ and test/ with the classes cat (red) and dog (green), in several formats and sizes."""
    root = tmp_path / "pets"
    for split in SPLITS:
        paint(root / split / "dog" / "a.png", (0, 255, 0), (5, 9))
        paint(root / split / "cat" / "a.png", (255, 0, 0))
        paint(root / split / "cat" / "b.JPEG", (255, 0, 0), (20, 10))
        (root / split / "cat" / "notes.txt").write_text("not an image")
    return root


def cpu(name, root="data", **options):
    return load(name, root, device="cpu", **options)


class TestDigits:
    def test_shapes_ranges_and_types(self):
        data = cpu("digits")
        assert data.train_images.shape == (1297, 1, 16, 16)
        assert data.test_images.shape == (500, 1, 16, 16)
        assert data.shape == (1, 16, 16)
        for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
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
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert to_unit(torch.tensor([0.25])).tolist() == [0.25]


class TestFolder:
    def test_classes_are_sorted_and_images_resized(self, tree):
        data = cpu(f"folder:{tree}", size=6)
        assert data.classes == ("cat", "dog")
        assert data.train_images.shape == data.test_images.shape == (3, 3, 6, 6)
        for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
            assert sorted(labels.tolist()) == [0, 0, 1]
            # cats are red, dogs are green: image and label stay together through the shuffle
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
        # the length of the first data chunk is wrong, so that the next chunk's name is noise
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
        """cifar-10-batches-py as it lies on disk, two images per batch: batch i holds the bytes i, label i (test: 0)."""
        from torchvision.datasets import CIFAR10

        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()

        def put(name, content):
            data = pickle.dumps(content)
            (folder / name).write_bytes(data)
            return [name, hashlib.md5(data).hexdigest()]

        def batch(value):
            return {"data": np.full((2, 3072), value, np.uint8), "labels": [value, value]}

        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        # torchvision verifies the real archive's checksums; these are the tiny one's
        monkeypatch.setattr(CIFAR10, "train_list", [put(f"data_batch_{i}", batch(i)) for i in range(1, 6)])
        monkeypatch.setattr(CIFAR10, "test_list", [put("test_batch", batch(0))])
        meta = put("batches.meta", {"label_names": names})
        monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
        return tmp_path

    def test_reads_the_batches(self, archive):
        data = cpu("cifar10", archive)
        assert data.train_images.shape == (10, 3, 32, 32)
        assert data.test_images.shape == (2, 3, 32, 32)
        assert data.train_labels.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert torch.allclose(data.train_images.mean(dim=(1, 2, 3)) * 255, data.train_labels.float())
        assert data.classes[3] == "cat"
        assert data.flip

    def test_channels_come_first(self, archive):
        image = np.repeat(np.array([10, 20, 30], np.uint8), 1024)  # the format: 1024 red, 1024 green, 1024 blue
        path = archive / "cifar-10-batches-py" / "test_batch"
        path.write_bytes(pickle.dumps({"data": image[None], "labels": [7]}))
        from torchvision.datasets import CIFAR10

        CIFAR10.test_list[0][1] = hashlib.md5(path.read_bytes()).hexdigest()
        data = cpu("cifar10", archive)
        assert (data.test_images[0].mean(dim=(1, 2)) * 255).tolist() == pytest.approx([10, 20, 30], abs=1e-3)

    def test_resizes(self, archive):
        data = cpu("cifar10", archive, size=8)
        assert data.shape == (3, 8, 8)
        assert torch.allclose(data.train_images.mean(dim=(1, 2, 3)) * 255, data.train_labels.float())

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is missing or incomplete under .*: pass download=True, or root="):
            cpu("cifar10", tmp_path)

    @pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
    def test_a_damaged_file(self, archive, name):
        (archive / "cifar-10-batches-py" / name).write_bytes(b"damaged")
        with pytest.raises(FileNotFoundError, match="CIFAR-10 is missing or incomplete"):
            cpu("cifar10", archive)


class TestGTSRB:
    @pytest.fixture
    def archive(self, tmp_path):
        """gtsrb/ as it lies on disk, with three classes told apart by colour."""
        base = tmp_path / "gtsrb"
        colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        for label, color in enumerate(colors):
            for track in range(2):
                paint(base / f"GTSRB/Training/{label:05d}/00000_{track:05d}.ppm", color, (15 + label, 20))
        rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
        for i, label in enumerate((2, 0)):
            paint(base / f"GTSRB/Final_Test/Images/{i:05d}.ppm", colors[label], (16, 16))
            rows.append(f"{i:05d}.ppm;16;16;1;1;15;15;{label}")
        (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
        return tmp_path

    def test_reads_images_with_their_labels(self, archive):
        data = cpu("gtsrb", archive)
        assert data.train_images.shape == (6, 3, 32, 32)
        assert sorted(data.train_labels.tolist()) == [0, 0, 1, 1, 2, 2]
        assert sorted(data.test_labels.tolist()) == [0, 2]
        for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
            assert images.mean(dim=(2, 3)).argmax(1).tolist() == labels.tolist()
        assert len(data.classes) == 43
        assert not data.flip

    def test_a_label_is_its_folders_number_also_when_a_class_is_absent(self, archive):
        (archive / "gtsrb/GTSRB/Training/00001").rename(archive / "00001")
        data = cpu("gtsrb", archive)
        assert data.train_images.mean(dim=(2, 3)).argmax(1).tolist() == data.train_labels.tolist()

    def test_decodes_once(self, archive):
        first = cpu("gtsrb", archive, size=8)
        for file in archive.rglob("*.ppm"):
            stat = file.stat()
            file.write_bytes(b"x" * stat.st_size)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert torch.equal(cpu("gtsrb", archive, size=8).train_images, first.train_images)

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"GTSRB is missing or incomplete under .*: pass download=True, or root="):
            cpu("gtsrb", tmp_path)

    def test_a_missing_table_of_test_labels(self, archive):
        (archive / "gtsrb" / "GT-final_test.csv").unlink()
        with pytest.raises(FileNotFoundError, match="GTSRB is missing or incomplete"):
            cpu("gtsrb", archive)

    def test_training_images_without_class_folders(self, archive):
        for folder in (archive / "gtsrb/GTSRB/Training").iterdir():
            folder.rename(archive / folder.name)
        with pytest.raises(FileNotFoundError, match="GTSRB is missing or incomplete"):
            cpu("gtsrb", archive)


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
            matches = [i for i, candidate in enumerate(self.shifts(original, shift)) if torch.equal(candidate, result)]
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
