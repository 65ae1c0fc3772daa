"""precision.py: wrong products of a reduced precision are noticed, rounding is not; and who asks."""

import logging
import math

import pytest
import torch
from conftest import draw_images, random_checkpoint
from plain_training import start_training
from torch.utils._python_dispatch import TorchDispatchMode

import precision
import test as test_script
from engine.training import settle_precision
from model import TwoStreamResNet
from precision import Disagreement, settle
from tools import embed, report, search
from utils import UserError

aten = torch.ops.aten
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


# Rounding and faults. Few CPUs multiply reduced precisions; where they must emulate them it takes 50 times as
# long, so here they are computed as hardware does: factors are rounded, added up in float32, and rounded.


class Hardware(TorchDispatchMode):
    """Inside, convolutions of reduced precision are those of a machine that may have a fault.

    spoil: changes a result in place; called with the operation's name, its results and its arguments.
    """

    def __init__(self, spoil=lambda *_: None):
        super().__init__()
        self.spoil = spoil

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        dtype = args[0].dtype if args and isinstance(args[0], torch.Tensor) else None
        if func not in (aten.convolution.default, aten.convolution_backward.default) or dtype == torch.float:
            return func(*args, **(kwargs or {}))
        results = func(*(a.float() if isinstance(a, torch.Tensor) else a for a in args))
        several = [results] if isinstance(results, torch.Tensor) else results
        several = [result if result is None else result.to(dtype) for result in several]
        self.spoil(func.__name__.partition(".")[0], several, args)
        return several[0] if isinstance(results, torch.Tensor) else several


def network(arch, kind, seed):
    """A network: untrained, with the statistics of a trained one, or with channels of very different size."""
    torch.manual_seed(seed)
    model = TwoStreamResNet(arch).to(memory_format=torch.channels_last)
    for module in model.modules() if kind != "untrained" else ():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.2, 1.5) if kind == "trained" else module.weight.data.normal_()
            module.bias.data.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 1.7)
        elif isinstance(module, torch.nn.Conv2d) and kind == "uneven":
            module.weight.data *= torch.randn(1, module.in_channels, 1, 1).exp()
            module.weight.data *= 10.0 ** torch.randint(-9, 1, (module.out_channels, 1, 1, 1))
    return model


def images(height, width, n=4, seed=0):
    """Smooth images with a black border, as padding makes them."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.randn(n, 3, 8, 4, generator=rng)
    batch = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    batch[:, :, : height // 8] = -2.118
    return {"visible": batch[: n // 2], "infrared": batch[n // 2 :]}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", ["untrained", "trained", "uneven"])
@pytest.mark.parametrize(
    ("arch", "height", "width"),
    [("resnet18", 32, 16), ("resnet18", 64, 32), ("resnet50", 32, 16), ("resnet18", 96, 48)],
)
def test_rounding_is_no_disagreement(arch, height, width, kind, dtype):
    for seed, training in ((0, True), (1, False)):
        model = network(arch, kind, seed)
        with Hardware():
            errors = precision.errors_of(model, images(height, width, 4, seed), dtype, training)
        assert 0 < max(errors.values()) < precision.BOUND * torch.finfo(dtype).eps, max(
            errors.items(), key=lambda item: item[1]
        )


def test_torch_s_own_bfloat16_on_the_cpu_is_no_disagreement():
    model = network("resnet18", "trained", 0)
    assert precision.check(model, images(64, 32, 2), BF16, training=False) is None


def test_every_layer_is_compared_and_nothing_is_left_changed():
    model = network("resnet18", "trained", 0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with Hardware():
        errors = precision.errors_of(model, images(32, 16), BF16, training=True)
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


def onto_two_positions(name, results, args):
    """Whether it is the convolution of stride 2 onto maps of 2x1, forward or backward."""
    maps, stride = (results[0], args[3]) if name == "convolution" else (args[0], args[4])
    weight = args[1] if name == "convolution" else args[2]
    return list(maps.shape[2:]) == [2, 1] and list(stride) == [2, 2] and weight.shape[2] == 3


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

    model = network("resnet18", "untrained", 0)
    with Hardware(spoil):
        found = precision.check(model, images(32, 16), BF16, training=True)
    assert (found.layer, found.what) == ("layer3.0.conv1", what)
    assert len(calls) == precision.REPEATS
    if damage is slightly:
        assert 0.03 < found.error < 0.2
    else:
        assert found.error == math.inf
    with Hardware(spoil):  # without gradients, in evaluation mode
        found = precision.check(model, images(32, 16), BF16, training=False)
    assert (found is None) == (what != "output")
    with Hardware(spoil):
        assert precision.check(model, images(64, 32), BF16, training=True) is None  # no such maps


def test_values_beyond_float16_are_wrong_there():
    model = network("resnet18", "untrained", 0).eval()
    model.layer1[0].bn2.weight.data *= 1e6
    with Hardware():
        assert precision.check(model, images(32, 16), BF16, training=False) is None
        found = precision.check(model, images(32, 16), FP16, training=False)
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
    assert training.dtype == BF16
    settle_precision(training)
    assert training.dtype == dtype
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
