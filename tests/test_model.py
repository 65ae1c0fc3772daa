"""model.py against a plain non-local block, its formulas, torchvision's weights, and itself when folded."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import outputs

from checkpoints import save_checkpoint
from model import GeM, NonLocal, PowerMean, TwoStreamResNet, extract_features, folded, from_checkpoint
from utils import UserError

pytestmark = pytest.mark.usefixtures("whole_resnet18")


def randomise_batch_norms(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)


def test_non_local_is_the_quadratic_block():
    torch.manual_seed(0)
    block = NonLocal(6)
    torch.nn.init.normal_(block.bn.weight)
    x = torch.randn(2, 6, 5, 3)
    theta, phi, g = block.theta_phi_g(x).flatten(2).split(1, dim=1)  # (N, 1, HW)
    affinity = theta.transpose(1, 2) @ phi / 15  # (N, HW, HW)
    y = (affinity @ g.transpose(1, 2)).transpose(1, 2).reshape(2, 1, 5, 3)
    expected = block.bn(block.expand(y)) + x
    block.bn.reset_running_stats()
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_non_local_is_the_plain_block_with_its_gradients_and_statistics(training, spread):
    torch.manual_seed(0)
    block = NonLocal(6).double().train(training)
    for parameter in (block.bn.weight, block.bn.bias, block.bn.running_mean):
        torch.nn.init.normal_(parameter)
    plain = copy.deepcopy(block)
    x = spread * torch.randn(2, 6, 5, 3, dtype=torch.float64) + 0.5
    weights = torch.randn_like(x)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        ours = block(found)
        theta, phi, g = plain.theta_phi_g(expected).split(1, dim=1)
        y = theta * (phi * g).mean((2, 3), keepdim=True)
        output = plain.bn(plain.expand(y)) + expected
        torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-5)
        (ours * weights).sum().backward()
        (output * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)
    for (name, p), (_, q) in zip(block.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, p), (_, q) in zip(block.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_non_local_begins_as_the_identity():
    x = torch.randn(2, 6, 5, 3)
    assert torch.equal(NonLocal(6)(x), x)


def test_gem_is_its_formula_and_stays_finite_in_bfloat16():
    x = torch.randn(2, 4, 3, 2)
    expected = (x.clamp(min=1e-6) ** 2.7).mean((2, 3)) ** (1 / 2.7)
    torch.testing.assert_close(GeM(2.7)(x), expected)
    x[0, 0] = -1  # nothing is positive: the floor of 1e-6
    x[0, 1] *= 1e12  # the powers themselves would overflow
    torch.testing.assert_close(GeM()(x)[0, 0], torch.tensor(1e-6))
    assert torch.isfinite(GeM()(x)).all()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = GeM()(x.bfloat16())
    assert pooled.dtype == torch.float32
    assert torch.isfinite(pooled).all()


def test_power_mean_is_gem_for_evaluation():
    x = torch.randn(2, 4, 3, 2)
    x[0, 0] = -1
    torch.testing.assert_close(PowerMean(2.7)(x), GeM(2.7)(x))
    torch.testing.assert_close(PowerMean(1.0, floor=0.0)(x), x.clamp(min=0).mean((2, 3)))
    expected = ((x.clamp(min=0) ** 3).mean((2, 3)) + 1e-12) ** (1 / 3)
    torch.testing.assert_close(PowerMean(3.0, 0.0, 1e-12)(x), expected)


@pytest.mark.parametrize(("arch", "stem"), [("resnet50", "shared"), ("resnet18", "two-stream")])
def test_folding_changes_no_feature_and_leaves_the_network_as_it_was(arch, stem):
    torch.manual_seed(0)
    model = TwoStreamResNet(arch, stem).eval()
    randomise_batch_norms(model)
    model.layer2[-1].bn.weight.data.zero_()  # a block that changes nothing …
    model.layer3[-1].bn.weight.data.zero_()
    model.layer3[-1].bn.bias.data.normal_()  # … and one that does
    before = {key: value.clone() for key, value in model.state_dict().items()}
    double, expected = folded(model.double()), outputs(model.double(), torch.float64)
    for network in (double, folded(double)):
        torch.testing.assert_close(outputs(network, torch.float64), expected, rtol=1e-9, atol=1e-9)
    kinds = {type(module) for module in double.modules()}
    assert torch.nn.BatchNorm2d not in kinds
    assert isinstance(double.layer2[-1], torch.nn.Identity)
    assert isinstance(double.layer3[-1], NonLocal)
    model.float()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_folding_in_lower_precision_costs_no_more_than_the_precision():
    torch.manual_seed(0)
    model = TwoStreamResNet("resnet18").eval()
    randomise_batch_norms(model)
    images = torch.randn(4, 3, 64, 32)
    exact = extract_features(model, [images], "visible")
    for network in (model, folded(model)):
        low = extract_features(network, [images], "visible", dtype=torch.bfloat16)
        assert (low * exact).sum(1).min() > 0.999


@pytest.mark.parametrize(
    ("arch", "dim", "places"),
    [
        ("resnet50", 2048, {"layer2": [3, 5], "layer3": [4, 6, 8]}),
        ("resnet18", 512, {"layer2": [1, 3], "layer3": [1, 3]}),
    ],
)
def test_layout(arch, dim, places):
    model = TwoStreamResNet(arch)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        layer = getattr(model, name)
        found = [k for k, block in enumerate(layer) if isinstance(block, NonLocal)]
        assert found == places.get(name, [])
    shapes = {}
    model.layer3.register_forward_hook(lambda _, __, out: shapes.update(layer3=out.shape))
    model.layer4.register_forward_hook(lambda _, __, out: shapes.update(layer4=out.shape))
    with torch.no_grad():
        assert model.eval()(visible=torch.randn(1, 3, 64, 32)).shape == (1, dim)
    assert model.dim == dim
    assert shapes["layer3"][2:] == shapes["layer4"][2:] == (4, 2)
    assert not model.neck.bias.requires_grad
    assert not model.neck.bias.any()


@pytest.mark.parametrize("stem", ["two-stream", "shared"])
def test_visible_rows_come_first_and_each_modality_takes_its_stem(stem):
    torch.manual_seed(0)
    model = TwoStreamResNet("resnet18", stem).eval()
    randomise_batch_norms(model)
    visible, infrared = torch.randn(2, 3, 32, 16), torch.randn(3, 3, 32, 16)
    with torch.no_grad():
        both = model(visible, infrared)
        torch.testing.assert_close(both[:2], model(visible=visible), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(both[2:], model(infrared=infrared), atol=1e-5, rtol=1e-4)
        alike = torch.allclose(model(visible=infrared), model(infrared=infrared), atol=1e-4)
    assert alike == (stem == "shared")


def test_the_shared_stem_takes_batch_statistics_over_all_images():
    model = TwoStreamResNet("resnet18", "shared").train()
    visible, infrared = torch.randn(4, 3, 32, 16), torch.randn(2, 3, 32, 16) + 3
    model.stems["shared"][1].momentum = 1.0
    model(visible, infrared)
    expected = model.stems["shared"][0](torch.cat([visible, infrared])).mean((0, 2, 3))
    torch.testing.assert_close(model.stems["shared"][1].running_mean, expected.detach(), atol=1e-5, rtol=1e-4)


def test_weights_from_a_file_reach_both_stems_and_the_trunk(tmp_path):
    source = torchvision.models.resnet18(num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = TwoStreamResNet("resnet18", weights=str(tmp_path / "weights.pth"))
    for stem in model.stems.values():
        assert torch.equal(stem[0].weight, source.conv1.weight)
    assert torch.equal(model.layer2[2].conv1.weight, source.layer2[1].conv1.weight)


def test_weights_that_do_not_fit_or_are_none_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"small\.pth does not fit"):
        TwoStreamResNet("resnet50", weights=str(tmp_path / "small.pth"))
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(UserError, match=r"text\.pth is refused"):
        TwoStreamResNet("resnet18", weights=str(tmp_path / "text.pth"))
    with pytest.raises(UserError, match=r"no file at .*gone\.pth"):
        TwoStreamResNet("resnet18", weights=str(tmp_path / "gone.pth"))


@pytest.mark.parametrize(
    ("stem", "into"), [("two-stream", "two-stream"), ("shared", "shared"), ("shared", "two-stream")]
)
def test_training_starts_from_a_trained_network(stem, into, tmp_path):
    trained = TwoStreamResNet("resnet18", stem)
    randomise_batch_norms(trained)
    save_checkpoint(
        {"net": trained.state_dict(), "args": {"arch": "resnet18", "stem": stem}}, tmp_path / "run.t"
    )
    model = TwoStreamResNet("resnet18", into, str(tmp_path / "run.t"))
    assert model.stem == into
    torch.testing.assert_close(outputs(model), outputs(trained))


@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "shared"), ("resnet50", "two-stream")])
def test_a_trained_network_of_another_kind_is_refused(arch, stem, tmp_path):
    net = TwoStreamResNet("resnet18", "two-stream").state_dict()
    save_checkpoint({"net": net, "args": {"arch": "resnet18", "stem": "two-stream"}}, tmp_path / "run.t")
    with pytest.raises(UserError, match=r"^--weights .*run\.t holds a resnet18 with a two-stream stem"):
        TwoStreamResNet(arch, stem, str(tmp_path / "run.t"))


def test_imagenet_weights_come_from_torchvision_or_the_user_is_told_what_to_do(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    # Torchvision's files are as old as that: torch has counted batches since 0.4.1.
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    enum = type(torchvision.models.ResNet18_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(enum, "get_state_dict", lambda self, *_, **__: state)
    model = TwoStreamResNet("resnet18", weights="imagenet")
    assert torch.equal(model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])

    def offline(self, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(enum, "get_state_dict", offline)
    with pytest.raises(UserError, match="--weights none"):
        TwoStreamResNet("resnet18", weights="imagenet")


def test_our_checkpoint_rebuilds_the_network(tmp_path):
    torch.manual_seed(0)
    model = TwoStreamResNet("resnet18", "two-stream").eval()
    save_checkpoint(
        {"net": model.state_dict(), "args": {"arch": "resnet18", "stem": "two-stream"}}, tmp_path / "a.t"
    )
    images = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        assert torch.equal(from_checkpoint(tmp_path / "a.t")(images), model(images))
    save_checkpoint(
        {"net": model.state_dict(), "args": {"arch": "resnet50", "stem": "two-stream"}}, tmp_path / "b.t"
    )
    with pytest.raises(UserError, match=r"b\.t does not fit"):
        from_checkpoint(tmp_path / "b.t")
    save_checkpoint({"net": model.state_dict()}, tmp_path / "c.t")
    with pytest.raises(UserError, match=r"c\.t holds no network of this project"):
        from_checkpoint(tmp_path / "c.t")


def test_extract_features_gives_unit_rows_in_order():
    torch.manual_seed(0)
    model = TwoStreamResNet("resnet18").eval()
    randomise_batch_norms(model)  # else both stems are the same
    images = torch.randn(5, 3, 48, 24)  # on smaller ones some CPUs compute bfloat16 wrongly
    features = extract_features(model, images.split(2), "aux")
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(features, F.normalize(model(visible=images)).detach(), atol=1e-5, rtol=1e-4)
    low = extract_features(model, images.split(2), "aux", dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    assert (low * features).sum(1).min() > 0.99
