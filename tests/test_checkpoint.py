import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from abdlab.checkpoint import (
    load_model,
    load_state,
    read_card,
    read_weights,
    save_model,
    save_state,
    write_atomically,
)
from abdlab.errors import CheckpointError
from abdlab.models import build
from abdlab.processes import owner


class Tiny(nn.Module):
    """A stranger's network."""

    def __init__(self, hidden=3, classes=2):
        super().__init__()
        self.conv = nn.Conv2d(1, hidden, 3)
        self.norm = nn.BatchNorm2d(hidden)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean(dim=(2, 3)))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny()


def refused(path, model=None, match=None):
    """Loading must fail with one sentence that names the file; returns it."""
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path, model)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(path).name in message
    return message


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestSafetensors:
    def test_model_and_card_come_back(self, tmp_path):
        model = build("wrn-10-1", width=2, classes=3, channels=1, mean=(0.3,), std=(0.2,), seed=4)
        path = save_model(
            tmp_path / "deep" / "m.safetensors", model, {"acc": 0.5, "attack": {"target": 1}}
        )
        again = load_model(path)
        assert equal(again.state_dict(), model.state_dict())
        assert again.card == model.card
        assert not again.training
        assert read_card(path) == {
            "kind": "model",
            "model": model.card,
            "acc": 0.5,
            "attack": {"target": 1},
        }
        x = torch.rand(2, 1, 8, 8)
        assert torch.equal(again(x), model.eval()(x))

    def test_a_strangers_module_or_a_function_that_makes_it(self, tmp_path, tiny):
        path = save_model(tmp_path / "m.safetensors", tiny)
        given = Tiny()
        assert load_model(path, given) is given
        assert equal(given.state_dict(), tiny.state_dict())
        assert equal(load_model(path, Tiny).state_dict(), tiny.state_dict())

    def test_a_file_that_abdlab_did_not_write(self, tmp_path, tiny):
        save_file(tiny.state_dict(), tmp_path / "m.safetensors")
        assert read_card(tmp_path / "m.safetensors") == {}
        assert equal(load_model(tmp_path / "m.safetensors", Tiny).state_dict(), tiny.state_dict())
        refused(tmp_path / "m.safetensors", match="does not say which architecture it holds")

    def test_tied_weights_can_be_saved(self, tmp_path):
        tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        tied[1].weight = tied[0].weight
        again = load_model(
            save_model(tmp_path / "m.safetensors", tied),
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        )
        assert torch.equal(again[1].weight, tied[0].weight)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
    def test_truncated_or_empty(self, tmp_path, tiny, share):
        path = save_model(tmp_path / "m.safetensors", tiny)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        refused(path, Tiny, "not a whole safetensors file")

    def test_a_pickle_that_is_called_safetensors(self, tmp_path, tiny):
        torch.save(tiny.state_dict(), tmp_path / "m.safetensors")
        refused(tmp_path / "m.safetensors", Tiny, "not a whole safetensors file")

    @pytest.mark.parametrize(
        "card",
        [
            "5",
            "null",
            "[]",
            '"text"',
            '{"model": 3}',
            '{"model": {"name": 5}}',
            '{"model": {}}',
            "{",
        ],
    )
    def test_a_card_that_makes_no_sense(self, tmp_path, tiny, card):
        save_file(tiny.state_dict(), tmp_path / "m.safetensors", metadata={"abdlab": card})
        refused(tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError):
            load_state(tmp_path / "m.safetensors")

    @pytest.mark.parametrize("name", ["wrn-12-1", "resnet-50", "os.system"])
    def test_a_card_with_an_unknown_architecture(self, tmp_path, tiny, name):
        save_file(
            tiny.state_dict(),
            tmp_path / "m.safetensors",
            metadata={"abdlab": json.dumps({"model": {"name": name}})},
        )
        refused(tmp_path / "m.safetensors", match="names an architecture that cannot be built")

    def test_a_card_may_not_ask_for_more_than_the_weights_beside_it(self, tmp_path, tiny):
        for model in (
            {"name": "wrn-10-1", "width": 10**6},
            {"name": "wrn-10-1", "classes": 10**9},
            {"name": "wrn-1000000-1"},
        ):
            card = json.dumps({"model": model})
            save_file(tiny.state_dict(), tmp_path / "m.safetensors", metadata={"abdlab": card})
            refused(tmp_path / "m.safetensors", match="larger than the weights beside it")

    def test_a_header_that_is_longer_than_any_models(self, tmp_path):
        header = b'{"a":"' + b" " * (17 * 2**20) + b'"}'
        path = tmp_path / "m.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        refused(path, Tiny, "its header takes 18 MB, and that of a model at most 17")

    def test_key_is_for_files_with_several(self, tmp_path, tiny):
        path = save_model(tmp_path / "m.safetensors", tiny)
        with pytest.raises(CheckpointError, match="holds one state dict: key= is for files"):
            load_model(path, Tiny, key="model")


class TestPickles:
    @pytest.mark.parametrize("suffix", ["pt", "pth"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_state_dict(self, tmp_path, tiny, suffix, zipped):
        path = tmp_path / f"m.{suffix}"
        torch.save(tiny.state_dict(), path, _use_new_zipfile_serialization=zipped)
        assert equal(load_model(path, Tiny).state_dict(), tiny.state_dict())
        assert read_weights(path)[1] == {}

    def test_common_wrappings(self, tmp_path, tiny):
        wrapped = {
            "state_dict": {f"module.{k}": v for k, v in tiny.state_dict().items()},
            "epoch": 3,
        }
        torch.save(wrapped, tmp_path / "m.pt")
        assert equal(load_model(tmp_path / "m.pt", Tiny).state_dict(), tiny.state_dict())

    @pytest.mark.parametrize(
        "write",
        [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))],
        ids=["torch", "pickle"],
    )
    def test_code_in_the_file_never_runs(self, tmp_path, write):
        victim = tmp_path / "owned"
        write({"fc.weight": Evil(victim)}, tmp_path / "m.pt")
        refused(
            tmp_path / "m.pt",
            Tiny,
            "pickle with code or whole objects in it, and loading it could run that code",
        )
        assert not victim.exists()
        pickle.loads(pickle.dumps(Evil(victim)))  # the trap is a real one
        assert victim.exists()

    def test_a_whole_pickled_model(self, tmp_path, tiny):
        torch.save(tiny, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", Tiny, "ask for a state dict")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_truncated_anywhere(self, tmp_path, zipped):
        path = tmp_path / "m.pt"
        torch.save(nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for length in range(0, len(whole), 5):
            path.write_bytes(whole[:length])
            refused(path, nn.Linear(2, 2))

    @pytest.mark.parametrize(
        "content",
        [b"", b"hello world", b"\x00" * 100, b"PK", b"PK\x03\x04" + b"\x00" * 50],
        ids=["empty", "text", "zeros", "two bytes of a zip", "head of a zip"],
    )
    def test_no_torch_file_at_all(self, tmp_path, content):
        (tmp_path / "m.pt").write_bytes(content)
        refused(tmp_path / "m.pt", Tiny, "truncated or no torch file")

    @pytest.mark.parametrize(
        "content",
        [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, "text", {"state_dict": {"a": 1}}],
    )
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", Tiny, "holds no state dict")


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


class TestFit:
    @pytest.fixture(params=["m.safetensors", "m.pt"])
    def put(self, request, tmp_path):
        """A function that writes a state dict to a file of either kind, and returns its
        path.
        """
        path = tmp_path / request.param

        def write(weights):
            save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
            return path

        return write

    def test_another_architecture(self, put):
        path = put(build("wrn-10-1", width=2).state_dict())
        message = refused(path, Tiny, "another architecture than Tiny")
        assert "conv.weight" in message  # lacked
        assert "more instead" in message  # a long list is cut

    def test_missing_keys(self, put, tiny):
        weights = {k: v for k, v in tiny.state_dict().items() if not k.startswith("fc.")}
        refused(put(weights), Tiny, r"lacks fc\.weight, fc\.bias, which Tiny needs")

    def test_extra_keys(self, put, tiny):
        refused(
            put({**tiny.state_dict(), "head.bias": torch.zeros(2)}),
            Tiny,
            r"has head\.bias, which Tiny does not know",
        )

    def test_wrong_shapes(self, put, tiny):
        refused(
            put(tiny.state_dict()),
            Tiny(classes=5),
            r"fc\.weight has shape \(2, 3\), but Tiny needs \(5, 3\)",
        )
        refused(
            put(tiny.state_dict()),
            Tiny(hidden=4),
            r"conv\.weight has shape \(3, 1, 3, 3\), but Tiny needs \(4, 1, 3, 3\)",
        )

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, put, tiny, value):
        tiny.fc.weight.data[0, 1] = value
        refused(put(tiny.state_dict()), Tiny, r"fc\.weight holds values that are not finite")

    def test_a_refused_file_leaves_the_given_model_alone(self, put, tiny):
        model = Tiny()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        tiny.fc.bias.data[1] = float("nan")  # the last key: all before it are fine
        refused(put(tiny.state_dict()), model)
        assert equal(model.state_dict(), before)

    def test_old_files_may_lack_the_batch_counter(self, put, tiny):
        weights = {
            k: v for k, v in tiny.state_dict().items() if not k.endswith("num_batches_tracked")
        }
        assert torch.equal(load_model(put(weights), Tiny).conv.weight, tiny.conv.weight)

    def test_half_precision_is_widened(self, put, tiny):
        found = load_model(
            put(
                {k: v.half() if v.is_floating_point() else v for k, v in tiny.state_dict().items()}
            ),
            Tiny,
        )
        assert found.fc.weight.dtype == torch.float32
        assert torch.allclose(found.fc.weight, tiny.fc.weight, atol=1e-3)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_a_missing_file(tmp_path, name):
    refused(tmp_path / name, Tiny, "there is no file")


def test_an_unknown_suffix(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"weights")
    refused(
        tmp_path / "m.onnx", Tiny, r"unknown kind: weights come as \.safetensors, \.pt or \.pth"
    )


class TestState:
    def test_nested_values_come_back(self, tmp_path):
        tree = {
            "step": 3,
            "lr": 0.1,
            "on": True,
            "none": None,
            "name": "student",
            "rng": torch.Generator().manual_seed(5).get_state(),
            "list": [1, [torch.tensor([1.5]), {}], "x"],
            "by number": {0: torch.tensor(2.0, dtype=torch.float64), 1: {"a": torch.zeros(0, 3)}},
        }
        found, card = load_state(save_state(tmp_path / "s.safetensors", tree, {"index": 7}))
        assert card == {"kind": "state", "index": 7}
        assert found["list"][1][0].tolist() == [1.5]
        assert found["list"][1][1] == {}
        assert torch.equal(found["rng"], tree["rng"])
        assert found["by number"][0].dtype == torch.float64
        assert found["by number"][1]["a"].shape == (0, 3)
        plain = ("step", "lr", "on", "none", "name")
        assert [found[k] for k in plain] == [tree[k] for k in plain]
        assert [type(found[k]) for k in plain] == [type(tree[k]) for k in plain]

    def test_a_real_adam_goes_on_as_if_nothing_had_happened(self, tmp_path):
        def net_and_adam():
            torch.manual_seed(0)
            net = nn.Linear(3, 2)
            return net, torch.optim.Adam(net.parameters(), lr=0.1)

        def learn(net, adam):
            adam.zero_grad()
            net(torch.ones(1, 3)).square().sum().backward()
            adam.step()

        net, adam = net_and_adam()
        learn(net, adam)
        path = save_state(
            tmp_path / "s.safetensors", {"net": net.state_dict(), "adam": adam.state_dict()}
        )
        learn(net, adam)

        again, other = net_and_adam()
        state, _ = load_state(path)
        assert list(state["adam"]["state"]) == [0, 1]
        again.load_state_dict(state["net"])
        other.load_state_dict(state["adam"])
        learn(again, other)
        assert equal(again.state_dict(), net.state_dict())

    @pytest.mark.parametrize(
        "tree",
        [
            {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
            {1: torch.ones(1), "1": torch.zeros(1)},
        ],
    )
    def test_keys_that_look_alike_stay_apart(self, tmp_path, tree):
        found, _ = load_state(save_state(tmp_path / "s.safetensors", tree))
        one, zero = found.values()
        assert one.item() == 1
        assert (zero["b"] if isinstance(zero, dict) else zero).item() == 0

    def test_tensors_that_share_memory(self, tmp_path):
        base = torch.arange(6.0)
        found, _ = load_state(
            save_state(tmp_path / "s.safetensors", {"all": base, "half": base[::2]})
        )
        assert found["half"].tolist() == [0, 2, 4]

    def test_what_cannot_be_saved_is_named(self, tmp_path):
        with pytest.raises(
            TypeError, match=r"state\.a\.0 is a set: a checkpoint holds tensors, numbers"
        ):
            save_state(tmp_path / "s.safetensors", {"a": [{1, 2}]})
        assert not list(tmp_path.iterdir())

    def test_weights_are_no_state(self, tmp_path, tiny):
        path = save_model(tmp_path / "m.safetensors", tiny)
        with pytest.raises(CheckpointError, match="not a run's checkpoint: it holds model"):
            load_state(path)

    def test_missing_and_truncated(self, tmp_path):
        path = tmp_path / "s.safetensors"
        with pytest.raises(CheckpointError, match="there is no file"):
            load_state(path)
        save_state(path, {"a": torch.ones(100)})
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            load_state(path)


class TestWriteAtomically:
    def test_writes_and_replaces(self, tmp_path):
        path = tmp_path / "a" / "b.txt"
        assert write_atomically(path, b"old") == path
        write_atomically(path, b"new")
        assert path.read_bytes() == b"new"
        assert [p.name for p in path.parent.iterdir()] == ["b.txt"]

    def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(self, tmp_path):
        path = write_atomically(tmp_path / "b.txt", b"old")
        with pytest.raises(TypeError):
            write_atomically(path, "text where bytes are due")  # fails with the temporary file open
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_what_a_killed_process_had_begun_is_removed_and_nothing_else(self, tmp_path):
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        machine, mine = owner().split("-")
        names = {
            "gone": f".b.txt.{machine}-{dead.pid}.abc.tmp",
            "mine": f".b.txt.{machine}-{mine}.abc.tmp",
            "elsewhere": f".b.txt.000000-{dead.pid}.abc.tmp",
            "other": f".c.txt.{machine}-{dead.pid}.abc.tmp",
        }
        for name in names.values():
            (tmp_path / name).touch()
        write_atomically(tmp_path / "b.txt", b"new")
        left = {names[key] for key in ("mine", "elsewhere", "other")}
        assert {path.name for path in tmp_path.iterdir()} == {"b.txt"} | left

    def test_a_failed_rename_leaves_nothing_behind(self, tmp_path):
        (tmp_path / "b").mkdir()
        with pytest.raises(OSError, match="b"):
            write_atomically(tmp_path / "b", b"new")
        assert [p.name for p in tmp_path.iterdir()] == ["b"]
