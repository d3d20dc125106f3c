"""A teacher from a file: networks by name, what weights tell, runs without labels."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from abdlab import checks
from abdlab.checkpoint import load_model, save_model
from abdlab.models import build
from abdlab.owned import (
    layers_told,
    make_network,
    named_by,
    pictures,
    size_told,
    told_by,
    unlabelled,
)
from abdlab.runs import Run, folder_of
from abdlab.settings import Settings, settings
from abdlab.students import distilled
from abdlab.teachers import WeakTeacher, poisoned_teacher, prepare


class Own(nn.Module):
    """A network of the user's: a tuple of logits and maps, pixels of mean 0."""

    def __init__(self, width=4, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        maps = self.norm(self.conv(x)).relu()
        return self.fc(maps.mean((2, 3))), maps


PATH = f"{__name__}:Own"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save({"model": Own().state_dict()}, tmp_path / "own.pt")
    return tmp_path / "own.pt"


def test_networks_by_name():
    assert make_network("wrn-10-1", classes=3, channels=1, width=4).card["classes"] == 3
    net = make_network("torchvision:resnet18", classes=7, keywords={"norm_layer": None})
    assert net.fc.out_features == 7
    assert make_network(PATH, classes=9, keywords={"classes": 2}).fc.out_features == 2
    same = [make_network(PATH, classes=5, seed=3).fc.weight for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("name", "keywords", "told"),
    [
        ("torchvision:resnet81", {}, "did you mean 'resnet18'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "would download"),
        ("torchvision:resnet18", {"depth": 3}, "cannot be made: .*depth"),
        ("no_such_model:Net", {}, "start abdlab where no_such_model.py lies"),
        (f"{__name__}:Nothing", {}, "cannot be imported"),
        (PATH, {"widht": 3}, "cannot be made with .*widht"),
        ("builtins:dict", {}, "makes a dict, and no nn.Module"),
        ("wrn-10-1", {"depth": 3}, "takes classes and channels, and no keywords"),
    ],
)
def test_names_that_lead_nowhere(name, keywords, told):
    with pytest.raises(ValueError, match=told):
        make_network(name, classes=10, keywords=keywords)


def test_mean_and_std_stand_before_a_foreign_network():
    plain = make_network(PATH, classes=5).eval()
    normed = make_network(PATH, classes=5, mean=[0.5, 0.4, 0.3], std=[0.2]).eval()
    x = torch.rand(2, 3, 8, 8)
    assert [*plain.state_dict()] == [*normed.state_dict()]
    by_hand = (x - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / 0.2
    assert torch.allclose(normed(x)[0], plain(by_hand)[0], atol=1e-6)


def test_what_weights_tell(tmp_path, weights):
    assert told_by(weights) == (None, 5, 3)
    save_file(Own().state_dict(), tmp_path / "own.safetensors")
    assert told_by(tmp_path / "own.safetensors") == (None, 5, 3)
    save_model(tmp_path / "ours.safetensors", build("wrn-10-1", classes=4, channels=1, width=2))
    assert told_by(tmp_path / "ours.safetensors") == ("wrn-10-1", 4, 1)
    assert named_by(tmp_path / "ours.safetensors").card["width"] == 2
    with pytest.raises(ValueError, match=r"set teacher\.model, such as torchvision:resnet18"):
        named_by(weights)
    assert layers_told(Own()).startswith("Own, ")


def test_what_is_missing_is_asked_for(tmp_path, weights):
    with pytest.raises(ValueError, match=r"data\.shape \(--shape of the commands\) is \(channels"):
        settings(overrides={"teacher.file": str(weights), "teacher.model": PATH}).dataset()
    own = {"teacher.file": str(weights), "data.shape": [3, 8, 8]}
    with pytest.raises(ValueError, match=r"set teacher\.model"):
        checks.check(settings(overrides=own))
    wrong = settings(overrides={**own, "teacher.model": PATH, "data.classes": 6})
    with pytest.raises(ValueError, match="tells 5 classes apart, and none has 6"):
        poisoned_teacher(tmp_path, wrong, wrong.dataset())


def own_settings(weights, **more):
    given = {
        "teacher.file": str(weights),
        "teacher.model": PATH,
        "data.shape": [3, 8, 8],
        "student.width": 2,
        "zskt.pseudo_batches": 2,
        "zskt.batch_size": 4,
        "zskt.width": 4,
        "zskt.attention": 0.0,
        **more,
    }
    return settings("quick/digits", given, device="cpu")


def test_a_run_without_labels_ends_with_unknown_scores(tmp_path, weights):
    chosen = own_settings(weights)
    checks.check(chosen, ["zskt", "bounded/zskt"])
    data = chosen.dataset()
    assert prepare(tmp_path, chosen, data) is chosen
    assert (chosen.trigger, chosen.target, chosen.opened) == (None, None, str(weights))
    teacher = poisoned_teacher(tmp_path, chosen, data)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(teacher(x), load_model(weights, Own())(x)[0])
    run = Run(folder_of(tmp_path, 0, "teacher"))
    assert (run.metrics["acc"], run.metrics["asr"]) == (None, None)
    assert len(run.config["weights"]) == 64
    for label in ("zskt", "bounded/zskt", "bounded/teacher"):
        model, metrics = distilled(tmp_path, chosen, data, teacher, label)
        assert (metrics["acc"], metrics["asr"]) == (None, None)
        assert model(x).shape == (2, 5)
    again = Settings.of(json.loads(run.file("config.json").read_text()), "cpu")
    assert torch.equal(poisoned_teacher(tmp_path, again, data)(x), teacher(x))
    with pytest.raises(ValueError, match="clean KD learns from labelled images"):
        checks.check(chosen, ["clean"])
    with pytest.raises(ValueError, match="no twin without a backdoor"):
        chosen.unpoisoned()
    with pytest.raises(ValueError, match="is for images with labels"):
        checks.check(own_settings(weights, **{"attack.trigger": "blend"}))


def test_another_file_is_another_run(tmp_path, weights):
    chosen = own_settings(weights)
    poisoned_teacher(tmp_path, chosen, chosen.dataset())
    torch.manual_seed(1)
    torch.save(Own().state_dict(), weights)
    with pytest.raises(ValueError, match=r"with other settings \(weights was"):
        poisoned_teacher(tmp_path, chosen, chosen.dataset())


def test_a_known_data_set_and_trigger_are_measured(tmp_path):
    net = build("wrn-10-1", channels=1, width=2)
    save_model(tmp_path / "ours.safetensors", net)
    given = {"teacher.file": str(tmp_path / "ours.safetensors"), "data.name": "digits"}
    chosen = settings(overrides={**given, "attack.trigger": "badnet_sq"}, device="cpu")
    checks.check(chosen, ["clean"])
    data = chosen.dataset()
    with pytest.warns(WeakTeacher):
        poisoned_teacher(tmp_path, chosen, data)
    metrics = Run(folder_of(tmp_path, 0, "teacher")).metrics
    assert 0 <= metrics["acc"] < 0.3
    assert metrics["asr"] is not None


def test_a_folder_of_images_has_no_labels(tmp_path):
    from PIL import Image

    folder = tmp_path / "mine" / "deeper"
    folder.mkdir(parents=True)
    for i, shade in enumerate((0, 128, 255)):
        Image.new("RGB", (9, 12), (shade, 0, 0)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("x")
    found = pictures(tmp_path / "mine", (3, 8, 8))
    assert found.shape == (3, 3, 8, 8)
    assert found[:, 0].mean((1, 2)).tolist() == pytest.approx([0, 128 / 255, 1])
    data = unlabelled(f"images:{tmp_path / 'mine'}", (3, 8, 8), ["cat", "dog"], "cpu")
    assert (len(data.test_images), len(data.test_labels), data.classes) == (3, 0, ("cat", "dog"))
    assert pictures(tmp_path / "mine", (1, 8, 4)).shape == (3, 1, 8, 4)
    assert size_told(tmp_path / "mine") == [12, 9]
    weights = {"fc.weight": torch.zeros(2, 3, 3, 3), "out.weight": torch.zeros(5, 2)}
    torch.save(weights, tmp_path / "w.pt")
    own = {"data.name": f"images:{tmp_path / 'mine'}", "teacher.file": str(tmp_path / "w.pt")}
    own = {**own, "teacher.model": "wrn-10-1"}
    assert settings("quick/digits", own).shape_and_classes() == ((3, 12, 9), 5)
    Image.new("RGB", (9, 11)).save(folder / "3.png")  # of two sizes: say which
    assert size_told(tmp_path / "mine") is None
    with pytest.raises(ValueError, match=r"do not say how large images are: data.shape \(--shape"):
        settings("quick/digits", own).shape_and_classes()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        pictures(tmp_path / "empty", (3, 8, 8))
