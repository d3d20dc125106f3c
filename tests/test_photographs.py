"""A photograph that carries the trigger, and the source that reads it like any other."""

import pytest
import torch
from PIL import Image

from abdlab.attacks.photographs import poison_photograph
from abdlab.attacks.triggers import Trigger, pack
from abdlab.sources.ood import OOD, photograph


def test_every_tile_by_the_naive_formula():
    photo = torch.randint(0, 256, (3, 21, 34), generator=torch.Generator().manual_seed(0))
    photo = photo.to(torch.uint8)
    trigger = Trigger("badnet_grid", {"size": 3, "corner": "top_left"})
    found = poison_photograph(photo, trigger, (3, 5, 5), tile=10)
    wanted = photo.clone()
    for top in (0, 10):
        for left in (0, 10, 20):
            for channel in range(3):
                for y in range(3):
                    for x in range(3):  # each pixel of the miniature is 2x2 of the tile
                        rows = slice(top + 2 * y, top + 2 * y + 2)
                        columns = slice(left + 2 * x, left + 2 * x + 2)
                        block = photo[channel, rows, columns].float() / 255
                        moved = block + (float((x + y) % 2 == 0) - block.mean())
                        wanted[channel, rows, columns] = (255 * moved.clamp(0, 1)).round()
    assert (found.int() - wanted.int()).abs().max() <= 1
    assert torch.equal(found[:, 20:], photo[:, 20:])  # the rest at the borders
    assert torch.equal(found[:, :, 30:], photo[:, :, 30:])


def test_one_channel_is_grey_and_a_pattern_of_the_small_images_fits(tmp_path):
    trigger = Trigger("weak", {"pattern": pack(torch.full((1, 4, 4), 51))})
    grey = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    found = poison_photograph(grey, trigger, (1, 4, 4), tile=8)
    assert found.unique().tolist() == [151]
    Image.fromarray(found.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    assert torch.equal(photograph(tmp_path / "photo.png"), found)
    source = OOD((1, 4, 4), image=tmp_path / "photo.png", patches=4, batch_size=2, epochs=1)
    assert torch.equal(source.photo, found)


def test_no_room_for_a_tile():
    with pytest.raises(ValueError, match="no room for a tile of 64x64: choose a smaller tile"):
        poison_photograph(torch.zeros(3, 50, 80).byte(), Trigger("badnet_sq"), (3, 8, 8))
