"""A stranger's file on the command line: audit and purify for real on a small network, and
one sentence for what does not fit.
"""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import abdlab
from abdlab.cli import app
from abdlab.presets import DEFENDED
from abdlab.purifiers import load_purified


class Small(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, classes)
        with torch.no_grad():  # every class is the answer to some images
            self.fc.weight.copy_(torch.eye(classes, 6) - torch.eye(classes, 6).roll(3, 1))
            self.fc.bias.zero_()
            self.last.bias.zero_()
            self.last.weight -= self.last.weight.mean((1, 2, 3), keepdim=True)

    def forward(self, x):
        x = self.last(self.norm(self.conv(x)).relu())
        return {"logits": 20 * self.fc(x.mean((2, 3))), "maps": x}


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(1)
    torch.save({"state_dict": Small().state_dict()}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


OWN = ["--model", f"{__name__}:Small", "--shape", "8", "--device", "cpu"]


def run(*words):
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)


def test_audit_ends_with_a_verdict(file, tmp_path):
    done = run("audit", file, *OWN, "--json", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    for told in ("1x8x8, 3 classes", "trigger: unknown", "ACC unknown, ASR unknown", "about "):
        assert told in done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["verdict"] in done.output
    assert {*found["scores"]} == {"inversion", "MM-BD", "FreeEagle", "bounds"}
    assert all(len(scores) == 3 for scores in found["scores"].values())


def test_images_of_ones_own_are_only_counted(file, tmp_path):
    from PIL import Image

    for shade in range(5):
        Image.new("L", (10, 10), 50 * shade).save(tmp_path / f"{shade}.png")
    done = run("audit", file, *OWN, "--data", tmp_path)
    assert done.exit_code == 0, done.output
    assert f"images:{tmp_path}, 5 test images" in done.output
    assert "On 5 images of " in done.output
    assert "ACC unknown" in done.output


@pytest.mark.slow
def test_defend_goes_from_a_file_to_a_verdict(tmp_path):
    """Notebook 08 with few steps: the folders are ordinary ones, the student loads, and the
    page says what the terminal said.
    """
    data = abdlab.load("digits", size=8, device="cpu")
    # every class more is inverted again, by the audit and by the purifier
    seen = data.train_labels < 4
    images, labels = data.train_images[seen], data.train_labels[seen]
    net = abdlab.build("wrn-10-1", classes=4, channels=1, width=4, mean=data.mean, std=data.std)
    list(abdlab.train(net, images, labels, epochs=3, batch_size=64, device="cpu"))
    abdlab.save_model(tmp_path / "theirs.safetensors", net)
    tiny = {"nayer.rounds": 1, "nayer.warmup": 0, "nayer.synthesis_steps": 2, "nayer.kd_steps": 2}
    tiny |= {"student.width": 2, "unlearn.rounds": 1, "unlearn.steps": 2, "unlearn.guard": 0}
    tiny |= {"unlearn.starts": 1}
    given = [word for name, value in tiny.items() for word in ("-p", f"{name}={value}")]
    root = tmp_path / "out"
    file = tmp_path / "theirs.safetensors"
    done = run("defend", file, "--shape", 8, "--device", "cpu", "--out", root, *given)
    assert done.exit_code == 0, done.output
    folder = root / "08_your_teacher"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["label"] == DEFENDED
    assert found["verdict"][0].startswith("Teacher: ")
    assert all(line in done.output for line in found["verdict"])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "unknown" in page
    student = abdlab.load_model(folder / "student.safetensors")
    assert student(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    assert abdlab.read_card(folder / "student.safetensors")["verdict"] == found["verdict"]
    known = abdlab.table(root)
    assert {"teacher", DEFENDED} <= {*known["label"]}
    assert known["acc"].isna().all()


def test_purify_writes_a_model_that_loads(file, tmp_path):
    out = tmp_path / "clean.safetensors"
    done = run("purify", file, *OWN, "--with", "bounded", "-o", out)
    assert done.exit_code == 0, done.output
    assert "% of synthetic images, ACC unknown" in done.output
    model = load_purified(out, Small())
    assert model.purified[0]["name"] == "bounded"
    assert model(torch.rand(2, 1, 8, 8))["logits"].shape == (2, 3)
    chain = run("purify", file, *OWN, "--with", "clp+bounded", "-o", out)
    assert chain.exit_code == 0, chain.output
    both = load_purified(out, Small()).purified
    alone = model.purified[0]
    assert [entry["name"] for entry in both] == ["clp", "bounded"]
    assert (both[1]["k"] == alone["k"]) == (both[0]["pruned"] == 0), "by the teacher as it was"
    given = run("purify", file, *OWN, "--with", "bounded", "-p", "bounded.k=2.5", "-o", out)
    assert given.exit_code == 0, given.output
    assert load_purified(out, Small()).purified[0]["k"] == 2.5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["audit", "no.pth", *OWN], "there is no file"),
        (["audit", "FILE", "--shape", "8"], "set teacher.model, such as torchvision:resnet18"),
        (["audit", "FILE", *OWN[:2]], "data.shape (--shape of the commands) is (channels"),
        (["audit", "FILE", *OWN, "--shape", "big"], "--shape takes numbers with commas"),
        (["audit", "FILE", *OWN, "--data", "digtis"], "did you mean 'digits'"),
        (["audit", "FILE", *OWN, "--keywords", "3"], "--keywords takes a dict"),
        (["audit", "FILE", "--model", "torchvision:resnet18", "--shape", "8"], "another arch"),
        (["audit", "FILE", *OWN, "--classes", "4"], "tells 3 classes apart"),
        (["purify", "FILE", *OWN, "-o", "out.pt"], "-o names a file .safetensors"),
        (["purify", "FILE", *OWN, "-o", "o.safetensors", "--with", "bonded"], "'bounded'"),
        (["purify", "FILE", *OWN, "-o", "o.safetensors", "-p", "unlearn.scan=2"], "unlearn.scans'"),
        (["purify", "FILE", *OWN, "-o", "o.safetensors", "-p", "unlearn.scans=0"], "at least 1"),
        (["defend", "FILE", *OWN[:2]], "data.shape (--shape of the commands) is (channels"),
        (["defend", "FILE", *OWN, "--label", "bounded/cmii"], "did you mean 'cmi'"),
        (["defend", "FILE", *OWN, "-p", "sv.k=1", "-p", "sv.k=2"], "-p names sv.k twice"),
    ],
)
def test_what_does_not_fit_is_one_sentence(file, words, told):
    done = run(*(file if word == "FILE" else word for word in words))
    assert done.exit_code == 2
    assert told in done.stderr, done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr
