import pytest
import torch
from torch import nn

from abdlab.features import frozen, mode, module_at, record


class Net(nn.Module):
    """Two convolutions with a batch norm between them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.second(self.drop(self.norm(self.first(x))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(1)) * 3


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith("norm.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestRecord:
    def test_keeps_the_named_outputs(self, net, x):
        net.eval()
        with record(net, ["first", "norm"]) as acts:
            net(x)
        assert set(acts) == {"first", "norm"}
        assert torch.equal(acts["first"], net.first(x))
        assert torch.equal(acts["norm"], net.norm(net.first(x)))

    def test_keeps_the_latest_pass_and_its_graph(self, net, x):
        with record(net.eval(), ["first"]) as acts:
            net(x)
            net(x[:1])
        assert len(acts["first"]) == 1
        acts["first"].sum().backward()
        assert net.first.weight.grad is not None

    def test_leaves_no_hook(self, net, x):
        with record(net, ["first", "second"]):
            net(x)
            assert hooks(net) == 2
        assert hooks(net) == 0

    def test_leaves_no_hook_after_an_error(self, net):
        with pytest.raises(RuntimeError, match="on purpose"), record(net, ["first"]):
            raise RuntimeError("on purpose")
        assert hooks(net) == 0

    def test_an_unknown_layer_gets_a_hint_and_leaves_no_hook(self, net):
        with (
            pytest.raises(ValueError, match="unknown layer of Net 'secnd': did you mean 'second'"),
            record(net, ["first", "secnd"]),
        ):
            pass
        assert hooks(net) == 0

    def test_module_at(self, net):
        assert module_at(net, "norm") is net.norm
        with pytest.raises(ValueError, match="unknown layer of Net ''"):
            module_at(net, "")


class TestMode:
    @pytest.mark.parametrize("training", [True, False])
    def test_sets_all_and_restores_each(self, net, training):
        net.train()
        net.norm.eval()
        before = {name: m.training for name, m in net.named_modules()}
        with mode(net, training) as inside:
            assert inside is net
            assert all(m.training == training for m in net.modules())
        assert {name: m.training for name, m in net.named_modules()} == before

    def test_restores_after_an_error(self, net):
        net.train()
        with pytest.raises(RuntimeError, match="on purpose"), mode(net, False):
            raise RuntimeError("on purpose")
        assert all(m.training for m in net.modules())


class TestFrozen:
    def test_a_training_pass_leaves_the_statistics(self, net, x):
        net.train()
        before = statistics(net)
        with frozen(net):
            net(x)
        assert same(statistics(net), before)
        net(x)
        assert not same(statistics(net), before)
        assert net.norm.num_batches_tracked == 1

    def test_train_mode_still_normalises_by_the_batch(self, net, x):
        net.train()
        with frozen(net), torch.no_grad():
            out = net.norm(net.first(x))
        assert torch.allclose(out.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5)
        assert torch.allclose(out.var(dim=(0, 2, 3), correction=0), torch.ones(2), atol=1e-2)

    def test_eval_mode_answers_as_ever(self, net, x):
        net.train()
        net(x)  # statistics of its own, so that batch and running ones differ
        net.eval()
        before, plain = statistics(net), net(x)
        with frozen(net):
            assert torch.equal(net(x), plain)
        assert same(statistics(net), before)
        assert net.norm.track_running_stats

    def test_gradients_reach_the_input_and_no_weight(self, net, x):
        net.second.weight.requires_grad_(False)
        wanted = {name: p.requires_grad for name, p in net.named_parameters()}
        x.requires_grad_()
        with frozen(net):
            assert not any(p.requires_grad for p in net.parameters())
            net(x).square().sum().backward()
        assert x.grad.abs().sum() > 0
        assert all(p.grad is None for p in net.parameters())
        assert {name: p.requires_grad for name, p in net.named_parameters()} == wanted

    def test_weights_may_go_on_learning(self, net, x):
        net.train()
        before = statistics(net)
        with frozen(net, weights=False):
            net(x).sum().backward()
        assert net.second.weight.grad is not None
        assert torch.equal(net.norm.running_mean, before["norm.running_mean"])
        assert torch.equal(net.norm.running_var, before["norm.running_var"])

    def test_restores_after_an_error_and_when_nested(self, net, x):
        net.train()
        with pytest.raises(RuntimeError, match="on purpose"), frozen(net), frozen(net):
            raise RuntimeError("on purpose")
        assert net.norm.track_running_stats
        assert all(p.requires_grad for p in net.parameters())

    def test_a_norm_without_statistics_keeps_none(self, x):
        bare = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)).train()
        plain = bare(x)
        with frozen(bare):
            assert torch.equal(bare(x), plain)
        assert not bare[0].track_running_stats
        assert bare[0].running_mean is None


def test_what_a_later_layer_changed_in_place_is_not_handed_on():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True), nn.Linear(2, 2))
    with record(net, ["0", "1"]) as acts:
        net(torch.rand(4, 3))
    assert acts["1"].min() >= 0
    with pytest.raises(ValueError, match="0 was recorded, and then changed in place"):
        acts["0"]
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with record(plain, ["0"]) as acts, torch.inference_mode():
        plain(torch.rand(4, 3))
    assert acts["0"].shape == (4, 2)
