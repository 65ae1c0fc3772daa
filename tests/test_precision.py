"""precision.py: wrong products of a reduced precision are noticed, rounding is not; and who asks."""

import logging
import math

import pytest
import torch
from conftest import draw_images, random_checkpoint
from plain_training import start_training
from rounding import Hardware, images, network
from torch.utils._python_dispatch import TorchDispatchMode

import precision
import test as test_script
from model import NonLocal
from precision import Disagreement, settle
from tools import embed, report, search
from utils import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16 = torch.bfloat16, torch.float16


# What --amp means


@pytest.mark.parametrize(
    ("amp", "device", "expected"),
    [
        ("off", CPU, None),
        ("bf16", CPU, torch.bfloat16),
        ("off", GPU, None),
        ("bf16", GPU, torch.bfloat16),
        ("fp16", GPU, torch.float16),
    ],
)
def test_amp_as_asked_for(amp, device, expected):
    assert precision.autocast_dtype(amp, device) == expected
    assert torch.backends.cudnn.allow_tf32 is (amp != "off")  # of convolutions
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(UserError, match=r"^--amp fp16 needs a GPU"):
        precision.autocast_dtype("fp16", CPU)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), None), ((7, 0), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_amp_auto_on_a_gpu_is_what_it_does_natively(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.autocast_dtype("auto", GPU) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, None)])
def test_amp_auto_on_the_cpu(native, expected, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: native)
    assert precision.autocast_dtype("auto", CPU) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("flags : sse avx512f avx512_bf16", True), ("flags : amx_bf16", True), ("flags : avx512f", False)],
)
def test_the_cpus_flags_tell_of_bfloat16(text, expected, monkeypatch):
    monkeypatch.setattr(precision.Path, "read_text", lambda self: text)
    assert precision.cpu_has_bfloat16() is expected


def test_a_machine_that_tells_nothing_has_no_bfloat16(monkeypatch):
    def refuse(self):
        raise FileNotFoundError

    monkeypatch.setattr(precision.Path, "read_text", refuse)
    assert precision.cpu_has_bfloat16() is False


# Rounding and faults


@pytest.mark.parametrize(
    ("arch", "height", "width", "kind", "dtype", "training"),
    [  # a few of what tests/rounding.py measures
        ("resnet18", 32, 16, "uneven", BF16, True),
        ("resnet18", 64, 32, "untrained", FP16, True),
        ("resnet18", 96, 48, "uneven", FP16, False),
        ("resnet50", 32, 16, "trained", BF16, False),
    ],
)
def test_rounding_is_no_disagreement(arch, height, width, kind, dtype, training):
    with Hardware():
        errors = precision.errors_of(network(arch, kind, 0), images(height, width), dtype, training)
    worst = max(errors.items(), key=lambda item: item[1])
    assert 0 < worst[1] < precision.BOUND * torch.finfo(dtype).eps, worst


def test_torch_s_own_bfloat16_on_the_cpu_is_no_disagreement():
    model = network("resnet18", "trained", 0)
    assert precision.check(model, images(64, 32, 2), BF16, training=False) is None


def test_every_layer_is_compared_and_nothing_is_left_changed():
    model = network("resnet18", "trained", 0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with Hardware():
        errors = precision.errors_of(model, images(32, 16), BF16, training=True)
    assert 0 < max(errors.values()) < precision.BOUND * torch.finfo(BF16).eps
    layers = {
        name.removesuffix(".expand")  # the block computes it together with its batch norm
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert {layer for layer, what in errors if what == "output"} == layers
    assert {layer for layer, what in errors if what == "weight gradient"} == layers
    assert layers - {layer for layer, what in errors if what == "input gradient"} == {
        "stems.visible.0", "stems.infrared.0",
    }  # fmt: skip
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_network_without_products_has_nothing_to_compare():
    network = torch.nn.Module()
    network.weight = torch.nn.Parameter(torch.ones(1))
    network.forward = lambda visible: network.weight * visible.flatten(1)
    assert precision.check(network, {"visible": torch.ones(2, 3, 4, 2)}, BF16, training=False) is None


class Small(torch.nn.Module):
    """Three convolutions, of which the second one, of stride 2, makes maps of 2x1 from images of 4x2."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = (3, 16, 1), (16, 32, 2), (32, 8, 1)
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, s, 1) for a, b, s in sizes)

    def forward(self, visible):
        for layer in self.layers:
            visible = layer(visible).relu()
        return visible.flatten(1)


def onto_two_positions(name, results, args):
    """Whether it is the convolution of stride 2 onto maps of 2x1, forward or backward."""
    maps, stride = (results[0], args[3]) if name == "convolution" else (args[0], args[4])
    return list(maps.shape[2:]) == [2, 1] and list(stride) == [2, 2]


def slightly(result):
    result.mul_(1 + 0.1 * torch.randn(result.shape, generator=torch.Generator().manual_seed(0)))


def infinite(result):
    result.view(-1)[7] = math.inf


def undefined(result):
    result.view(-1)[7] = math.nan


@pytest.mark.parametrize("damage", [slightly, infinite, undefined])
@pytest.mark.parametrize(
    ("what", "operation", "place"),
    [
        ("output", "convolution", 0),
        ("input gradient", "convolution_backward", 0),
        ("weight gradient", "convolution_backward", 1),
    ],
)
@pytest.mark.parametrize("sometimes", [False, True])
def test_a_wrong_convolution_is_named(what, operation, place, damage, sometimes):
    calls = []

    def spoil(name, results, args):
        if name == operation and onto_two_positions(name, results, args):
            calls.append(name)
            if not sometimes or len(calls) % precision.REPEATS == 2:
                damage(results[place])

    model, batch = Small(), {"visible": torch.randn(8, 3, 4, 2)}
    with Hardware(spoil):
        found = precision.check(model, batch, BF16, training=True)
    assert (found.layer, found.what) == ("layers.1", what)
    assert len(calls) == precision.REPEATS
    if damage is slightly:
        assert 0.03 < found.error < 0.2
    else:
        assert found.error == math.inf
    with Hardware(spoil):  # without gradients, in evaluation mode
        found = precision.check(model, batch, BF16, training=False)
        assert (found is None) == (what != "output")
        larger = {"visible": torch.randn(8, 3, 8, 4)}
        assert precision.check(model, larger, BF16, training=True) is None  # no such maps


def test_the_network_s_convolution_onto_two_positions_is_named():
    def spoil(name, results, args):
        if onto_two_positions(name, results, args) and args[1].shape[2] == 3:
            slightly(results[0])

    with Hardware(spoil):
        found = precision.check(network("resnet18", "untrained", 0), images(32, 16), BF16, training=False)
    assert (found.layer, found.what) == ("layer3.0.conv1", "output")


class WrongProducts(TorchDispatchMode):
    """Inside, products of maps in bfloat16 are a tenth too large."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 1.1 * result if func is torch.ops.aten.mul.Tensor and result.dtype == BF16 else result


def test_a_wrong_product_of_a_non_local_block_is_named():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = NonLocal(8)

        def forward(self, visible):
            return self.block(visible).flatten(1)

    batch = {"visible": torch.randn(4, 8, 6, 3, generator=torch.Generator().manual_seed(0))}
    with Hardware():
        assert precision.check(Block(), batch, BF16, training=False) is None
        with WrongProducts():
            found = precision.check(Block(), batch, BF16, training=False)
    assert (found.layer, found.what) == ("block", "output")


def test_values_beyond_float16_are_wrong_there():
    model = network("resnet18", "untrained", 0).eval()
    model.layer1[0].bn2.weight.data *= 1e6
    with Hardware():
        assert precision.check(model, images(32, 16), BF16, training=False) is None
        found = precision.check(model, images(32, 16), FP16, training=False)
    assert found.error == math.inf


@pytest.mark.parametrize(("image", "weight"), [(300.0, 300.0), (2.0**-10, 2.0**20)])
def test_neither_results_nor_weights_beyond_float16_are_made_smaller(image, weight):
    model, batch = Small(), {"visible": image * torch.rand(8, 3, 4, 2)}
    model.layers[0].weight.data = weight * model.layers[0].weight.abs().detach()
    with Hardware():
        assert precision.check(model, batch, BF16, training=False) is None
        found = precision.check(model, batch, FP16, training=False)
    assert found.layer == "layers.0"
    assert found.error == math.inf


def test_without_memory_for_all_images_half_of_them_are_compared(monkeypatch):
    sizes = []

    def errors_of(model, images, *_):
        sizes.append([len(some) for some in images.values()])
        if sum(sizes[-1]) > 12:
            raise torch.OutOfMemoryError
        return {("a", "output"): 0.0}

    monkeypatch.setattr(precision, "errors_of", errors_of)
    batch = {"visible": torch.zeros(32, 3, 1, 1), "infrared": torch.zeros(17, 3, 1, 1)}
    assert precision.check(None, batch, BF16, training=True) is None
    assert sizes == [[32, 17], [16, 9], [8, 5], [4, 3]]
    monkeypatch.setattr(precision, "errors_of", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        precision.check(None, batch, BF16, training=True)


# What follows from a disagreement, and who asks


WRONG = Disagreement("layer3.0.conv1", "weight gradient", 0.7341, 0.0156)


class Several:
    """Processes of which the second finds something."""

    rank = 0

    def all_gather_object(self, value):
        return [value, WRONG]


@pytest.fixture
def asked(monkeypatch, caplog):
    """A machine with bfloat16 that is wrong, and what it was asked to compare: (sizes, dtype, training)."""
    asked = []

    def check(model, images, dtype, training):
        asked.append(({modality: tuple(some.shape) for modality, some in images.items()}, dtype, training))
        assert model(**images).isfinite().all()
        return WRONG

    monkeypatch.setattr(precision, "check", check)
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(logging.getLogger("mce"), "propagate", True)
    caplog.set_level(logging.WARNING, "mce")
    return asked


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


WARNING = (
    "--amp {}: this machine computes bfloat16 wrongly: the weight gradient of layer3.0.conv1 is off by 0.73, "
    "rounding by less than 0.016; {}"
)


@pytest.mark.parametrize(
    ("amp", "dtype", "choice"),
    [("auto", None, "float32 is used instead"), ("bf16", BF16, "it is used as asked for")],
)
def test_one_process_that_disagrees_is_enough(amp, dtype, choice, asked, monkeypatch, caplog):
    monkeypatch.setattr(precision, "check", lambda *_: None)
    model = torch.nn.Linear(1, 1)
    assert settle(amp, model, lambda: {"visible": torch.zeros(1)}, Several()) == dtype
    assert warnings(caplog) == [WARNING.format(amp, choice)]


def test_float32_has_nothing_to_compare(asked):
    assert settle("off", torch.nn.Linear(1, 1), lambda: 1 / 0, Several()) is None
    assert asked == []


@pytest.mark.parametrize(("amp", "dtype"), [("auto", None), ("bf16", BF16)])
def test_a_run_compares_a_step_s_batch(sysu, asked, caplog, amp, dtype):
    training = start_training(sysu, "--amp", amp)
    assert training.dtype == dtype
    assert not training.scaler.is_enabled()
    sizes = {"visible": (16, 3, 32, 16), "infrared": (8, 3, 32, 16)}  # the aux images go through a stem too
    assert asked == [(sizes, BF16, True)]
    assert len(warnings(caplog)) == 1


def test_train_asks_before_it_describes_the_run(sysu, asked, train_here):
    status, out, errors = train_here(
        *["--data-path", sysu, "--img-h", 32, "--img-w", 16, "--arch", "resnet18", "--weights", "none"],
        *["--batch-size", 4, "--num-pos", 2, "--gpu", -1, "--amp", "auto", "--workers", 1, "--check"],
    )
    assert status == 0
    said = "\n".join([out, *errors])
    assert said.count(WARNING.format("auto", "float32 is used instead")) == 1
    assert "threads), float32, 1 process(es)" in said
    assert len(asked) == 1


def test_commands_that_extract_features_ask_first(sysu, asked, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = random_checkpoint(tmp_path / "a.t", amp="auto")
    machine = ["--gpu", "-1", "--workers", "1", "--test-batch", "6"]
    evaluated = ["--resume", checkpoint, "--data-path", str(sysu), "--trial", "0", *machine]
    draw_images(tmp_path / "in", 7)
    embedded = ["--resume", checkpoint, "--images", "in", "--modality", "infrared", "--output", "out"]
    searched = ["--resume", checkpoint, "--gallery", "out", "--query", "in/0000.png"]

    def run_embed(*flags):
        return embed.main(embed.get_args_parser().parse_args([*embedded, *machine, *flags]))

    def run_search():
        words = [*searched, "--query-modality", "visible", *machine]
        return search.main(search.get_args_parser().parse_args(words))

    def run_report():
        report.main([*evaluated, "--output", "report", "--figures", "cmc"])

    both = {"visible": (3, 3, 32, 16), "infrared": (3, 3, 32, 16)}
    for command, sizes in (
        (lambda: test_script.main(evaluated), both),
        (run_report, both),
        (run_embed, {"infrared": (6, 3, 32, 16)}),
        (run_search, {"visible": (1, 3, 32, 16)}),
    ):
        asked.clear()
        command()
        assert asked == [(sizes, BF16, False)]
        said = capsys.readouterr()
        assert (said.out + said.err).count(WARNING.format("auto", "float32 is used instead")) == 1
    assert embed.read_manifest("out").precision == "float32"


def test_files_that_cannot_be_read_are_left_to_the_command(asked, tmp_path, capsys):
    checkpoint = random_checkpoint(tmp_path / "a.t", amp="auto")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_text("no image")
    words = [
        "--resume",
        checkpoint,
        "--images",
        folder,
        "--modality",
        "infrared",
        "--output",
        tmp_path / "out",
    ]
    args = embed.get_args_parser().parse_args([*map(str, words), "--gpu", "-1", "--workers", "1"])
    assert embed.main(args) == 1
    assert asked == []
    assert "cannot read" in capsys.readouterr().err
