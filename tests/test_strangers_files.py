"""Files of weights as other programs write them, and as nobody should: the first load,
the second end in one sentence, run no code and take little memory.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from abdlab import CheckpointError, build, load_model, save_model
from abdlab.checkpoint import load_state, read_card, read_weights, save_state
from abdlab.pickles import interpret


class Net(nn.Module):
    """A stranger's network."""

    def __init__(self, classes=2):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean(dim=(2, 3)))


class Wrapped(nn.Module):
    """A Lightning module's shape: the network as an attribute."""

    def __init__(self):
        super().__init__()
        self.model = Net()


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net()
    made(torch.rand(4, 1, 6, 6))  # batch norm's statistics and its counter move
    return made


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(path, model=Net, match=None, **options):
    """The one sentence that loading ends in."""
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path, model, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + 2 * len(str(path))
    return message


def renamed(weights, change):
    return {change(name): value for name, value in weights.items()}


class TestReader:
    """Our reader gives what torch.load gives."""

    def values(self):
        base = torch.arange(24.0).reshape(4, 6)
        return {
            **{
                f"as {dtype}": torch.arange(6).to(dtype)
                for dtype in (
                    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64),
                    *(torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
                    *(torch.complex64, torch.uint16, torch.uint32, torch.float8_e4m3fn),
                )
            },
            "one number": torch.tensor(3.5),
            "nothing": torch.zeros(0, 3),
            "transposed": base.t(),
            "every other": base[1::2, ::3],
            "the end of it": base[3],
            "expanded": torch.tensor([2.0]).expand(5),
            "parameter": nn.Parameter(torch.ones(2)),
            "buffer": nn.Buffer(torch.ones(2)),
            "channels last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        }

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_every_kind_of_tensor(self, tmp_path, protocol, zipped):
        options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
        right = self.values()
        torch.save(right, tmp_path / "m.pt", **options)
        if protocol == 2 and zipped:  # all that torch's own reader of weights can take
            right = torch.load(tmp_path / "m.pt", weights_only=True)
        found, card = read_weights(tmp_path / "m.pt")
        assert card == {}
        assert found.keys() == right.keys()
        for name, value in right.items():
            assert found[name].dtype == value.dtype, name
            assert found[name].shape == value.shape, name
            assert torch.equal(found[name].to(torch.complex64), value.to(torch.complex64)), name

    def test_what_is_read_does_not_hang_on_the_file(self, tmp_path, net):
        torch.save(net.state_dict(), tmp_path / "m.pt")
        found, _ = read_weights(tmp_path / "m.pt")
        found["fc.bias"][0] = 7  # it can be written to, and the file stays
        again, _ = read_weights(tmp_path / "m.pt")
        assert torch.equal(again["fc.bias"], net.fc.bias)
        (tmp_path / "m.pt").write_bytes(b"")
        assert torch.equal(found["fc.weight"], net.fc.weight)

    @pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
    def test_plain_values_of_every_protocol(self, protocol):
        value = {
            "numbers": [0, 1, -1, 255, 65536, -(2**40), 2**70, 1.5, True, False, None],
            "texts": ["", "a", "ü" * 300, b"raw"[:0].decode()],
            "nested": [[], [[]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": {"b": []}}],
        }
        value["twice"] = value["nested"]
        stream = io.BytesIO(pickle.dumps(value, protocol=protocol))
        assert interpret(stream) == value

    def test_only_entries_by_text_are_kept(self):
        value = {"a": 1, 2: "two", ("t",): 3, None: 4, "b": {5: 6}}
        assert interpret(io.BytesIO(pickle.dumps(value))) == {"a": 1, "b": {}}


class TestLayouts:
    @pytest.fixture(params=["zip", "legacy"])
    def put(self, request, tmp_path):
        def write(value, name="m.pt"):
            zipped = request.param == "zip"
            torch.save(value, tmp_path / name, _use_new_zipfile_serialization=zipped)
            return tmp_path / name

        return write

    @pytest.mark.parametrize(
        "key", ["model", "net", "state_dict", "model_state_dict", "ema", "weights", "teacher"]
    )
    def test_a_state_dict_under_any_one_key(self, put, net, key):
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.rand(2, 1, 6, 6)).sum().backward()
        optimizer.step()
        path = put(
            {
                "epoch": 3,
                key: net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best_acc": torch.tensor(0.9),
                "history": [torch.rand(2)],
            }
        )
        assert same(load_model(path, Net), net)

    def test_a_key_within_a_key(self, put, net):
        assert same(load_model(put({"checkpoint": {"model": net.state_dict()}}), Net), net)

    def test_several_are_named_and_key_takes_one(self, put, net):
        other = Net()
        nested = {"ema": other.state_dict(), "step": 3}
        path = put({"model": net.state_dict(), "averages": nested, "epoch": 1})
        message = refused(path)
        assert message.endswith(
            "holds several state dicts: pass key= with one of model, averages.ema"
        )
        assert same(load_model(path, Net, key="model"), net)
        assert same(load_model(path, Net, key="averages.ema"), other)
        assert torch.equal(read_weights(path, key="model")[0]["fc.bias"], net.fc.bias)
        refused(path, key="emma", match="no state dict under 'emma': there are model, averages.ema")

    def test_one_under_two_keys_is_one(self, put, net):
        weights = net.state_dict()
        assert same(load_model(put({"model": weights, "best": weights}), Net), net)

    def test_backdoorbench(self, put, net):
        """attack_result.pt as its save_attack_result writes it: weights under "model",
        the poisoned parts of the data sets beside them.
        """

        def part(n):
            return {
                "bd_data_container": {
                    "data_dict": {
                        i: {"path": f"./record/bd/{i}.png", "other_info": (np.int64(3), i, 1, 0)}
                        for i in range(n)
                    },
                    "save_file_format": ".png",
                    "save_folder_path": "./record/bd",
                },
                "getitem_all": True,
                "getitem_all_switch": False,
                "original_index_array": np.arange(n),
                "poison_indicator": np.ones(n, dtype=np.int8),
                "save_folder_path": None,
                "in_ram": [Image.new("RGB", (2, 2)), np.array(["a", "b"])],
            }

        path = put(
            {
                "model_name": "preactresnet18",
                "num_classes": np.int64(10),
                "model": net.state_dict(),
                "data_path": "./data/cifar10",
                "img_size": [32, 32, 3],
                "clean_data": "cifar10",
                "bd_train": part(40),
                "bd_test": part(20),
                "asr": np.float64(0.97),
            },
            "attack_result.pt",
        )
        assert same(load_model(path, Net), net)

    def test_the_official_abd_teacher(self, put, net):
        path = put({"epoch": 200, "arch": "wrn-16-2", "state_dict": net.state_dict()}, "best.pth")
        assert same(load_model(path, Net), net)

    def test_the_official_abd_run(self, put, net):
        """last.pth of a run: generator and student, with the arguments of the program."""
        generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        optimizer = torch.optim.Adam(net.parameters())
        path = put(
            {
                "args": argparse.Namespace(dataset="CIFAR10", lr=0.1, device=torch.device("cpu")),
                "n_pseudo_batches": 7,
                "generator_state_dict": generator.state_dict(),
                "student_state_dict": net.state_dict(),
                "optimizer_student": optimizer.state_dict(),
                "scheduler_student": {"last_epoch": 7, "_last_lr": [0.1]},
                "Eval/test_acc": np.float64(71.5),
            },
            "last.pth",
        )
        refused(path, match="several state dicts: .* generator_state_dict, student_state_dict$")
        assert same(load_model(path, Net, key="student_state_dict"), net)

    def test_lightning(self, put, net):
        path = put(
            {
                "epoch": 9,
                "global_step": 3900,
                "pytorch-lightning_version": "2.5.0",
                "state_dict": renamed(net.state_dict(), "model.{}".format),
                "loops": {
                    "fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}
                },
                "callbacks": {
                    "ModelCheckpoint{'monitor': 'acc'}": {
                        "best_model_score": torch.tensor(0.9),
                        "best_k_models": {"a.ckpt": torch.tensor(0.9)},
                        "dirpath": "/somewhere",
                    }
                },
                "optimizer_states": [
                    {"state": {0: {"exp_avg": torch.rand(3)}}, "param_groups": []}
                ],
                "lr_schedulers": [],
                "hparams_name": "kwargs",
                "hyper_parameters": {"lr": 0.1, "root": pathlib.PurePosixPath("data"), "k": {1, 2}},
                "counts": collections.Counter("aab"),
                "more": collections.defaultdict(list, a=[1]),
            },
            "last.ckpt",
        )
        assert same(load_model(path, Net), net)
        assert same(load_model(path, Wrapped).model, net)

    def test_thop(self, put, net):
        weights = net.state_dict()
        for module in [m for m in net.modules() if not list(m.children())] + [net]:
            module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
            module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
        path = put({"net": net.state_dict(), "acc": 93.0, "epoch": 199})
        message = refused(path, match="total_ops, total_params, conv.total_ops and 5 more")
        option = "ignore=('total_ops', 'total_params')"
        assert option in message
        found = load_model(path, Net, ignore=("total_ops", "total_params"))
        assert all(torch.equal(found.state_dict()[k], v) for k, v in weights.items())

    def test_averaged_weights(self, put, net):
        path = put(torch.optim.swa_utils.AveragedModel(net).state_dict())
        assert "ignore=('n_averaged',) leaves them out" in refused(path)
        assert same(load_model(path, Net, ignore="n_averaged"), net)

    def test_other_extra_entries_can_be_left_out(self, put, net):
        path = put({**net.state_dict(), "loss.weight": torch.ones(2), "epoch": 3})
        message = refused(path, match=r"has loss\.weight, epoch, which Net does not know")
        assert "ignore=('epoch', 'loss')" in message
        assert same(load_model(path, Net, ignore=("loss", "epoch")), net)

    def test_data_parallel_and_compiled(self, put, net):
        for wrapped in (
            nn.DataParallel(net),
            torch.compile(net),
            torch.compile(nn.DataParallel(net)),
            nn.DataParallel(torch.compile(net)),
        ):
            path = put(wrapped.state_dict())
            assert not {"fc.bias"} & read_weights(path)[0].keys()
            assert same(load_model(path, Net), net)

    def test_a_compiled_part(self, put, net):
        net.conv = torch.compile(net.conv)
        path = put(net.state_dict())
        assert "conv._orig_mod.weight" in read_weights(path)[0]
        assert torch.equal(load_model(path, Net).conv.weight, net.conv.weight)


class TestPrefixes:
    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    @pytest.mark.parametrize(
        "prefix",
        [
            *("module.", "_orig_mod.", "model.", "module.model.", "model.module."),
            *("_orig_mod.module.", "module._orig_mod.", "model._orig_mod.module."),
        ],
    )
    def test_they_come_off_in_any_order_and_format(self, tmp_path, net, prefix, suffix):
        path, weights = tmp_path / f"m.{suffix}", renamed(net.state_dict(), (prefix + "{}").format)
        torch.save(weights, path) if suffix == "pt" else safetensors.torch.save_file(weights, path)
        assert same(load_model(path, Net), net)

    def test_not_where_names_fit(self, tmp_path):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = nn.Linear(2, 2)
                self.module = nn.Linear(2, 2)
                self.weight = nn.Parameter(torch.rand(2, 2))

        both = Both()
        torch.save(both.state_dict(), tmp_path / "m.pt")
        assert same(load_model(tmp_path / "m.pt", Both), both)
        prefixed = renamed(both.state_dict(), "module.{}".format)
        torch.save(prefixed, tmp_path / "m.pt")
        assert same(load_model(tmp_path / "m.pt", Both), both)

    def test_two_weights_for_one_name(self, tmp_path, net):
        weights = net.state_dict()
        torch.save({**weights, "module.fc.bias": torch.zeros(2)}, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", match=r"has module\.fc\.bias, which Net does not know")
        weights = renamed(weights, "module.{}".format)
        torch.save({"fc.bias": torch.zeros(2), **weights}, tmp_path / "m.pt")
        refused(
            tmp_path / "m.pt",
            match=r"two weights for fc\.bias: fc\.bias and module\.fc\.bias",
        )

    @pytest.mark.parametrize(
        "wrap",
        [
            nn.DataParallel,
            torch.compile,
            lambda net: nn.DataParallel(torch.compile(net)),
            lambda net: torch.compile(nn.DataParallel(net)),
        ],
        ids=["parallel", "compiled", "parallel of compiled", "compiled of parallel"],
    )
    def test_save_model_writes_without(self, tmp_path, wrap):
        model = build("wrn-10-1", width=2, classes=3, channels=1, seed=4)
        path = save_model(tmp_path / "m.safetensors", wrap(model))
        assert read_weights(path)[0].keys() == model.state_dict().keys()
        assert read_card(path)["model"] == model.card
        assert same(load_model(path), model)

    def test_save_model_of_a_wrapper_with_a_model(self, tmp_path, net):
        wrapped = Wrapped()
        path = save_model(tmp_path / "m.safetensors", wrapped)
        assert read_weights(path)[0].keys() == net.state_dict().keys()
        assert same(load_model(path, Net), wrapped.model)
        assert same(load_model(path, Wrapped), wrapped)

    def test_a_compiled_part_is_saved_by_its_own_name(self, tmp_path, net):
        plain = set(net.state_dict())
        net.conv = torch.compile(net.conv)
        path = save_model(tmp_path / "m.safetensors", net)
        assert read_weights(path)[0].keys() == plain
        assert torch.equal(load_model(path, Net).conv.weight, net.conv.weight)
        assert same(load_model(path, net), net)


class TestTorchIsTheJudge:
    def test_tied_weights_that_safetensors_left_out(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Linear(3, 3)
                self.head = nn.Linear(3, 3)
                self.head.weight = self.embed.weight

        tied = Tied()
        safetensors.torch.save_model(tied, str(tmp_path / "m.safetensors"))
        assert len(read_weights(tmp_path / "m.safetensors")[0]) == 3
        found = load_model(tmp_path / "m.safetensors", Tied)
        assert same(found, tied)
        untied = nn.ModuleDict({"embed": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
        refused(tmp_path / "m.safetensors", untied, r"lacks (head|embed)\.weight")

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*")
    def test_old_weight_norm(self, tmp_path):
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
        torch.save(nn.DataParallel(old).state_dict(), tmp_path / "m.pt")
        again = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
        new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
        x = torch.rand(4, 3)
        for model in (again, new):
            assert torch.allclose(load_model(tmp_path / "m.pt", model)(x), old.eval()(x))

    def test_frozen_batch_norm(self, tmp_path, net):
        from torchvision.ops import FrozenBatchNorm2d

        torch.save(net.state_dict(), tmp_path / "m.pt")
        frozen = Net()
        frozen.norm = FrozenBatchNorm2d(3)
        found = load_model(tmp_path / "m.pt", frozen)
        x = torch.rand(2, 1, 6, 6)
        assert torch.allclose(found(x), net.eval()(x), atol=1e-6)

    def test_a_model_that_refuses_is_one_sentence_and_keeps_its_weights(self, tmp_path, net):
        class Picky(Net):
            def _load_from_state_dict(self, state_dict, *rest):
                super()._load_from_state_dict(state_dict, *rest)
                raise KeyError("no such\nthing")

        torch.save(net.state_dict(), tmp_path / "m.pt")
        picky = Picky()
        before = {k: v.clone() for k, v in picky.state_dict().items()}
        refused(tmp_path / "m.pt", picky, "does not fit Picky")
        assert all(torch.equal(before[k], v) for k, v in picky.state_dict().items())

    def test_a_mask_of_minus_infinity_that_the_model_has_too(self, tmp_path):
        class Masked(nn.Module):
            def __init__(self, value=float("-inf")):
                super().__init__()
                self.fc = nn.Linear(2, 2)
                self.register_buffer("mask", torch.full((2, 2), value).triu(1))

        torch.save(Masked().state_dict(), tmp_path / "m.pt")
        assert load_model(tmp_path / "m.pt", Masked).mask[0, 1] == float("-inf")
        refused(tmp_path / "m.pt", Masked(0.0), "mask holds values that are not finite")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
    def test_weights_of_a_wrong_type(self, tmp_path, net, dtype):
        weights = net.state_dict()
        torch.save({**weights, "fc.weight": weights["fc.weight"].to(dtype)}, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", match=r"fc\.weight holds \w+ numbers, and Net needs floating")

    def test_a_counter_as_floats(self, tmp_path, net):
        weights = {k: v.double() for k, v in net.state_dict().items()}
        torch.save(weights, tmp_path / "m.pt")
        assert same(load_model(tmp_path / "m.pt", Net), net)
        weights["norm.num_batches_tracked"] += 0.5
        torch.save(weights, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", match="num_batches_tracked holds fractions")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    def test_narrow_floats_are_widened(self, tmp_path, net, dtype):
        weights = {k: v.to(dtype) if v.ndim else v for k, v in net.state_dict().items()}
        torch.save(weights, tmp_path / "m.pt")
        found = load_model(tmp_path / "m.pt", Net)
        assert torch.equal(found.fc.weight, weights["fc.weight"].float())
        weights["fc.weight"][0, 0] = float("nan")
        torch.save(weights, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", match="fc.weight holds values that are not finite")


class TestKinds:
    """What holds no state dict says what it is."""

    def test_torchscript(self, tmp_path, net):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(net), str(tmp_path / "m.pt"))
        refused(tmp_path / "m.pt", match="is a TorchScript program")

    def test_an_exported_program(self, tmp_path, net):
        program = torch.export.export(net.eval(), (torch.rand(1, 1, 6, 6),))
        torch.export.save(program, tmp_path / "m.pt2")
        os.rename(tmp_path / "m.pt2", tmp_path / "m.pt")
        refused(tmp_path / "m.pt", match=r"is a program of torch\.export")

    def test_a_distributed_checkpoint(self, tmp_path, net):
        import torch.distributed.checkpoint as dcp

        dcp.save(net.state_dict(), checkpoint_id=tmp_path / "shards")
        refused(tmp_path / "shards", match="is a folder: .*sharded or distributed")

    @pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "m-1-of-2.bin"])
    def test_one_shard(self, tmp_path, net, name):
        (tmp_path / name).write_bytes(b"anything")
        refused(tmp_path / name, match=r"is part [12] of [32] of one model: join the parts")

    def test_the_index_of_shards(self, tmp_path):
        index = {"metadata": {}, "weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}}
        for name in ("model.safetensors.index.json", "index.bin"):
            (tmp_path / name).write_text(json.dumps(index))
            refused(tmp_path / name, match="is the index of a sharded checkpoint")

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
            (b"\x93NUMPY\x01\x00" + bytes(100), "a numpy array"),
            (b"GGUF" + bytes(100), "a GGUF file"),
            (b"\x1f\x8b" + bytes(100), "a compressed file"),
            (bytes(257) + b"ustar" + bytes(300), "a tar archive"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
            (b"\n<!DOCTYPE html><html></html>", "a web page"),
            (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"' + bytes(50), "a safetensors file"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize("suffix", ["pt", "h5", "PTH"])
    def test_by_the_first_bytes(self, tmp_path, content, kind, suffix):
        (tmp_path / f"m.{suffix}").write_bytes(content)
        refused(tmp_path / f"m.{suffix}", match=f"is {kind}")

    @pytest.mark.parametrize(
        ("entry", "kind"),
        [
            ("a.npy", "an archive of numpy arrays"),
            ("model.weights.h5", "a Keras model"),
            ("weights/readme.txt", "a zip archive without weights"),
        ],
    )
    def test_zip_archives(self, tmp_path, entry, kind):
        with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
            archive.writestr(entry, b"x")
        refused(tmp_path / "m.pt", match=f"is {kind}")

    def test_the_refused_name_is_said(self, tmp_path, net):
        for value, name in (
            ({"fc.weight": net.fc.weight, "f": os.system}, r"posix\.system"),
            ({"model": net}, r"__main__\.Net|test_strangers_files\.Net"),
            ({"a": net.state_dict(), "loss": nn.CrossEntropyLoss()}, r"torch\.nn\.modules\.loss"),
            ({"a": net.state_dict(), "f": np.load}, r"numpy\.load"),
            ({"a": net.state_dict(), "f": eval}, r"eval"),
        ):
            torch.save(value, tmp_path / "m.pt")
            refused(tmp_path / "m.pt", match=rf"could run that code \(.*({name}).*\): ask for")

    def test_what_was_found_instead(self, tmp_path):
        for value, what in (
            ({"epoch": 3, "lr": 0.1}, "a dict with epoch, lr"),
            ({}, "an empty dict"),
            ([1], "a list"),
            (torch.rand(3), "one tensor"),
        ):
            torch.save(value, tmp_path / "m.pt")
            refused(tmp_path / "m.pt", match=f"holds no state dict: .* found {what}$")

    @pytest.mark.parametrize("make", [lambda: 3, "Net", dict, lambda a: Net(), lambda: 1 / 0])
    def test_what_makes_no_model(self, tmp_path, net, make):
        torch.save(net.state_dict(), tmp_path / "m.pt")
        refused(tmp_path / "m.pt", make, "m.pt: ")


class TestPaths:
    @pytest.mark.parametrize("suffix", ["PT", "Pth", "CKPT", "pth.tar", "bin", "pkl"])
    def test_suffixes_of_torch(self, tmp_path, net, suffix):
        torch.save(net.state_dict(), tmp_path / f"m.{suffix}")
        assert same(load_model(tmp_path / f"m.{suffix}", Net), net)

    def test_safetensors_in_upper_case(self, tmp_path, net):
        path = save_model(tmp_path / "M.SafeTensors", net)
        assert same(load_model(path, Net), net)

    def test_home(self, tmp_path, net, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        save_model("~/a/m.safetensors", net, {"acc": 0.5})
        save_state("~/s.safetensors", {"step": 3})
        torch.save(net.state_dict(), tmp_path / "m.pt")
        assert (tmp_path / "a" / "m.safetensors").is_file()
        assert same(load_model("~/a/m.safetensors", Net), net)
        assert same(load_model("~/m.pt", Net), net)
        assert read_card("~/a/m.safetensors")["acc"] == 0.5
        assert load_state("~/s.safetensors")[0] == {"step": 3}
        assert read_weights("~/m.pt")[0].keys() == net.state_dict().keys()
        assert str(tmp_path) in refused("~/none.pt", match="there is no file")

    def test_links_to_nothing_to_itself_and_to_a_device(self, tmp_path):
        for name, target in (("a.pt", "nowhere"), ("b.pt", "b.pt"), ("c.pt", "/dev/zero")):
            (tmp_path / name).symlink_to(target)
            refused(tmp_path / name, match="there is no file|is a device or a pipe")
        os.mkfifo(tmp_path / "d.pt")
        refused(tmp_path / "d.pt", match="is a device or a pipe")
        refused(tmp_path, match="is a folder")


def put(count):
    return struct.pack("<I", count)


def module(name):
    """The steps that push a global, by the oldest opcode."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def text(value):
    return b"X" + put(len(value.encode())) + value.encode()


def hostile(folder):
    """Write the corpus; yields the names of its files."""
    folder = pathlib.Path(folder)
    marker = str(folder / "owned")
    run = module("os mkdir") + text(marker) + b"\x85R"  # os.mkdir(marker), if ever run
    weight = torch.ones(2, 3)

    def archive(name, program, extra=(), packed=False):
        with zipfile.ZipFile(folder / name, "w") as file:
            kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            file.writestr("archive/data.pkl", program, kind)
            file.writestr("archive/byteorder", b"little")
            file.writestr("archive/data/0", bytes(24))
            for entry, data in extra:
                file.writestr(entry, data, kind)
        return name

    def raw(name, data):
        (folder / name).write_bytes(data)
        return name

    def storage(count=6, kind="torch FloatStorage", key="0"):
        steps = b"(" + text("storage") + module(kind) + text(key) + text("cpu")
        return steps + b"\x8a\x08" + struct.pack("<q", count) + b"tQ"

    def number(value):
        return b"\x8a\x09" + int(value).to_bytes(9, "little", signed=True)

    def tensor(shape, stride, offset=0, **options):
        numbers = b"(" + b"".join(map(number, shape)) + b"t("
        numbers += b"".join(map(number, stride)) + b"t"
        steps = module("torch._utils _rebuild_tensor_v2") + b"(" + storage(**options)
        return steps + number(offset) + numbers + b"\x89}tR"

    def weights(steps):
        return b"\x80\x02}" + text("fc.weight") + steps + b"s."

    # code in every place
    for place, steps in {
        "top": run,
        "value": b"}" + text("a") + run + b"s",
        "key": b"}" + run + b"K\x01s",
        "popped": run + b"0}",
        "in a list": b"](" + run + b"e",
        "in a tuple": run + b"\x85",
        "as state": b"}" + run + b"b",
        "as an id": run + b"Q",
        "as arguments": module("collections OrderedDict") + b"(](" + run + b"etR",
        "as hooks": module("torch._utils _rebuild_parameter") + b"(" + run + run + b"tR",
        "inst": b"(" + text(marker) + b"ios\nmkdir\n",
        "obj": b"(" + module("os mkdir") + text(marker) + b"o",
        "newobj": module("os mkdir") + text(marker) + b"\x85\x81",
        "newobj_ex": module("os mkdir") + text(marker) + b"\x85}\x92",
        "stack global": text("os") + text("mkdir") + b"\x93" + text(marker) + b"\x85R",
        "nested type": module("torch._tensor _rebuild_from_type_v2")
        + b"(" + module("os mkdir") + module("torch Tensor") + text(marker) + b"\x85}tR",
        "extension": b"\x82\x01",
        "a call of a text": text("os.mkdir") + text(marker) + b"\x85R",
        "a call of data": b"}" + text(marker) + b"\x85R",
        "a type that is called": module("torch Tensor") + b"K\x05\x85R",
        "getattr": module("builtins getattr") + b"(" + module("torch Tensor") + text("x") + b"tR",
        "torch.load": module("torch load") + text(marker) + b"\x85R",
        "bytes in memory": module("torch.storage _load_from_bytes") + b"U\x01a\x85R",
        "out of band": b"\x97",
    }.items():  # fmt: skip
        yield archive(f"code {place}.pt", b"\x80\x04" + steps + b".")
        yield raw(f"code {place} raw.pth", b"\x80\x04" + steps + b".")
    # in the parts of a legacy file
    buffer = io.BytesIO()
    torch.save({"fc.weight": weight}, buffer, _use_new_zipfile_serialization=False)
    ends, data = [], buffer.getvalue()
    buffer.seek(0)
    for _ in range(5):
        ends.append((buffer.tell(), list(pickletools.genops(buffer)) and buffer.tell()))
    for part, (start, end) in enumerate(ends):
        bad = data[:start] + b"\x80\x02" + run + b"." + data[end:]
        yield raw(f"code legacy {part}.pt", bad)
    yield archive("code in a second pickle.pt", b"\x80\x02}.", [("b/data.pkl", run + b".")])
    torch.save(nn.Linear(2, 2), folder / "whole model.pt")
    yield "whole model.pt"

    # archives that unfold without end
    yield archive("bomb pickle.pt", bytes(2**28), packed=True)
    yield archive("bomb storage.pt", weights(tensor((2, 3), (3, 1), key="1")),
                  [("archive/data/1", bytes(2**28))], packed=True)  # fmt: skip
    with zipfile.ZipFile(folder / "many.pt", "w") as file:
        file.writestr("archive/data.pkl", weights(tensor((2, 3), (3, 1))))
    whole = (folder / "many.pt").read_bytes()
    start = whole.index(b"PK\x01\x02")
    entry = whole[start : whole.index(b"PK\x05\x06")]
    many = 2**19
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(entry) * many, start, 0)
    yield raw("many entries.pt", whole[:start] + entry * many + end)

    # shapes that are too large or none
    ones = 2**20
    yield archive("shape huge.pt", weights(tensor((2**40, 2**20), (2**20, 1))))
    yield archive("shape expanded.pt", weights(tensor((10**7, 10**7), (0, 0))))
    yield archive("shape claims.pt", weights(tensor((2**40,), (1,), count=2**40)))
    yield archive("shape negative.pt", weights(tensor((-1, 2), (1, 1))))
    yield archive("shape stride.pt", weights(tensor((2, 2), (-5, 1))))
    yield archive("shape offset.pt", weights(tensor((2, 3), (3, 1), offset=2**50)))
    yield archive("shape overflow.pt", weights(tensor((2**62, 4), (1, 1))))
    yield archive("shape deep.pt", weights(tensor((1,) * 5000, (1,) * 5000)))
    yield archive("no such storage.pt", weights(tensor((2, 3), (3, 1), key="../../x")))
    yield archive("kind.pt", weights(tensor((2, 3), (3, 1), kind="torch QInt8Storage")))
    yield archive("half expanded.pt", b"\x80\x02}(" + b"".join(
        text(f"w{i}") + tensor((2**20,), (0,)) for i in range(500)) + b"u.")  # fmt: skip

    # pickles that eat memory or time
    yield archive("memo.pt", b"\x80\x02}r" + put(2**31 - 1) + b".")
    yield archive("lists.pt", b"\x80\x02(" + b"]" * (4 * ones) + b"l.")
    yield archive("memoize.pt", b"\x80\x04}" + b"\x94" * (4 * ones) + b".")
    yield archive("pops.pt", b"\x80\x02" + b"N" * (ones // 8) + b"0" * (ones // 8) + b"}.")
    yield archive("deep.pt", b"\x80\x02)" + b"\x85" * (ones // 4) + b"}\x86.")
    yield archive("deep key.pt", b"\x80\x02})" + b"\x85" * (ones // 4) + b"Ns.")
    yield archive("deep list.pt", b"\x80\x02" + b"]" * (ones // 8) + b"a" * (ones // 8 - 1) + b".")
    yield archive("bytes.pt", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".")
    yield archive("bytearray.pt", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".")
    yield archive("frame.pt", b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.")
    yield archive("digits.pt", b"\x80\x02I" + b"9" * ones + b"\n.")
    yield archive("long.pt", b"\x80\x02\x8b" + put(2**31 - 1) + b"\x01.")
    yield archive("no line.pt", b"\x80\x02c" + b"a" * (64 * ones))
    wide = "\N{GRINNING FACE}".encode() + b"a" * (80 * ones)
    yield archive("wide text.pt", b"\x80\x02X" + put(len(wide)) + wide + b".")
    texts = text("\N{GRINNING FACE}" + "a" * 60000)
    yield archive("wide texts.pt", b"\x80\x02(" + texts * 1500 + b"l.")
    loop = b"\x80\x02}q\x00" + text("a") + b"h\x00s."
    yield archive("loop.pt", loop)
    tree = b"\x80\x02}q\x00"
    for level in range(1, 9):
        items = b"".join(text(str(i)) + b"h" + bytes([level - 1]) for i in range(50))
        tree += b"}q" + bytes([level]) + b"(" + items + b"u"
    yield archive("tree.pt", tree + b".")
    typed = module("torch._tensor _rebuild_from_type_v2")
    steps = typed + b"q\x00" + b"(h\x00NN" * 3000 + b"N" + b"tNt" * 3000
    yield archive("nested types.pt", b"\x80\x02" + steps + b".")
    name = text("a\nb\x1b[2J" + "c" * 500)
    yield archive("names.pt", b"\x80\x02}" + name + tensor((2, 3), (3, 1)) + b"s.")
    yield archive(
        "begins.pt",
        b"\x80\x02}("
        + b"".join(text("module.model." * 9 + str(i)) + tensor((2, 3), (3, 1)) for i in range(3000))
        + b"u.",
    )

    # wrong values
    state = Net().state_dict()
    for value in (float("nan"), float("inf")):
        torch.save({**state, "fc.weight": torch.full((2, 3), value)}, folder / f"{value}.pt")
        yield f"{value}.pt"
    for kind in (torch.int8, torch.bool, torch.complex64):
        torch.save({**state, "fc.weight": weight.to(kind)}, folder / f"{kind}.pt")
        yield f"{kind}.pt"
    torch.save({**state, "fc.weight": weight.to_sparse()}, folder / "sparse.pt")
    yield "sparse.pt"

    # not whole
    for zipped in (True, False):
        torch.save(state, folder / "w.pt", _use_new_zipfile_serialization=zipped)
        whole = (folder / "w.pt").read_bytes()
        for share in (0.1, 0.5, 0.99):
            yield raw(f"cut {zipped} {share}.pt", whole[: int(len(whole) * share)])
    card = safetensors.torch.save(state)
    for share in (0.01, 0.3, 0.99):
        yield raw(f"cut {share}.safetensors", card[: int(len(card) * share)])

    # links
    for name, target in (("self.pt", "self.pt"), ("zero.pt", "/dev/zero"), ("folder.pt", "/")):
        (folder / name).symlink_to(target)
        yield name
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    yield "zero.safetensors"

    # headers
    yield raw("claims.safetensors", struct.pack("<Q", 2**30) + b"{}")
    with open(folder / "sparse.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**30 - 8) + b"{")
        file.truncate(2**30 + 100)
    yield "sparse.safetensors"
    with open(folder / "sparse zeros.pt", "wb") as file:
        file.truncate(2**32)
    yield "sparse zeros.pt"

    def header(name, content, tail=b""):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        return raw(name, struct.pack("<Q", len(content)) + content + tail)

    deep = b"[" * (4 * ones)
    yield header("deep.safetensors", deep)
    yield header("long header.safetensors", b'{"a":"' + b" " * (30 * ones) + b'"}')
    shape = {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 24]}
    yield header("shape.safetensors", {"fc.weight": shape}, bytes(24))
    shape = {"dtype": "F32", "shape": [2**31 - 1, 2**31 - 1], "data_offsets": [0, 2**64 - 1]}
    yield header("offsets.safetensors", {"fc.weight": shape}, bytes(24))
    names = {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40000)}
    yield header("names.safetensors", names)
    one = {"fc.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    for i, model in enumerate(
        (
            {"name": "wrn-10-1", "width": 10**6},
            {"name": "wrn-10-1", "classes": 10**9},
            {"name": "wrn-1000000-1"},
            {"name": "wrn-10-100000"},
            {"name": "os.system"},
            {"name": "resnet-18", "width": 2**40},
        )
    ):
        metadata = {"__metadata__": {"abdlab": json.dumps({"model": model})}, **one}
        yield header(f"card {i}.safetensors", metadata, bytes(24))
    metadata = {"__metadata__": {"abdlab": "[" * ones}, **one}
    yield header("card deep.safetensors", metadata, bytes(24))


#: loads every file of the corpus in a process of its own, and writes what came of it
PROGRAM = """
import json, os, resource, signal, sys, time
sys.path.insert(0, sys.argv[2])
import torch
from abdlab import load_model
from abdlab.errors import CheckpointError
from test_strangers_files import Net

torch.set_num_threads(1)
for name in json.load(open(sys.argv[1] + "/names.json")):
    path = os.path.join(sys.argv[1], name)
    read, write = os.pipe()
    began = time.monotonic()
    if not (child := os.fork()):
        signal.alarm(100)
        # a fork's memory is not its parent's: pages of libraries come as they are used
        own = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        try:
            load_model(path, None if name.startswith("card") else Net)
            said = "loaded"
        except CheckpointError as error:
            said = "refused " + str(error)
        except BaseException as error:
            said = f"failed {type(error).__name__}: {error}"
        os.write(write, f"{own} {said[:4000]}".encode())
        os._exit(0)
    os.close(write)
    _, status, usage = os.wait4(child, 0)
    with open(read) as pipe:
        own, _, said = pipe.read().partition(" ")
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    peak, seconds = usage.ru_maxrss * 1024 - int(own or 0), time.monotonic() - began
    print(json.dumps((name, status, said, peak, size, seconds)), flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's fork and /proc")
def test_hostile_files_run_no_code_take_little_memory_and_end_in_one_sentence(tmp_path):
    """Memory is counted on top of what the process has once torch is imported."""
    names = list(hostile(tmp_path))
    assert len(names) == len(set(names)) >= 25
    (tmp_path / "names.json").write_text(json.dumps(names))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(pathlib.Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == names, done.stderr
    assert not (tmp_path / "owned").exists()
    wrong = []
    for name, status, said, peak, size, seconds in rows:
        sentence = said.removeprefix("refused ").replace(str(tmp_path), "")
        if status or not said.startswith("refused ") or "\n" in said or len(sentence) > 400:
            wrong.append((name, status, said[:500]))
        if not said.isprintable():
            wrong.append((name, "not printable", said[:500]))
        if name.startswith("code ") and "pickle with code" not in said and "second" not in name:
            wrong.append((name, "not named as code", said[:500]))
        if peak > 2 * size + 500e6:
            wrong.append((name, f"{peak / 1e6:.0f} MB", f"of {size / 1e6:.0f}"))
        if seconds > 60:
            wrong.append((name, f"{seconds:.0f} s"))
    heavy = max(rows, key=lambda row: row[3])
    print(f"{len(rows)} files; the heaviest: {heavy[0]}, {heavy[3] / 1e6:.0f} MB")
    assert not wrong, "\n".join(map(str, wrong))


def test_the_traps_of_the_corpus_are_real(tmp_path):
    """What the corpus would do to a reader that unpickles."""
    corpus = itertools.takewhile(lambda name: name.startswith("code"), hostile(tmp_path))
    names = [name for name in corpus if "raw" in name]
    sprung = 0
    for name in names:
        with contextlib.suppress(Exception):
            pickle.loads((tmp_path / name).read_bytes())
        if (tmp_path / "owned").exists():
            sprung += 1
            (tmp_path / "owned").rmdir()
    assert sprung >= 14
