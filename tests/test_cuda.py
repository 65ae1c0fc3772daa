"""Training and evaluation on a real GPU, compared with the CPU. tests/test_fake_cuda.py needs no GPU."""

from copy import deepcopy
from itertools import islice

import pytest
import torch
from conftest import run_script, tiny_flags
from plain_training import assert_step, start_training, tables, take_steps

from checkpoints import load_checkpoint
from eval_metrics import k_reciprocal
from train import evaluate, rebuild_memory, train_one_epoch
from utils import MODALITIES

GPU = "0"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def weights_and_gradients(training):
    """The network's weights and statistics, and Adam's means of gradients once there are some, on the CPU."""
    moments = {f"gradient {k}": own["exp_avg"] for k, own in enumerate(training.optimizer.state.values())}
    everything = dict(training.model.state_dict()) | moments
    return {name: value.detach().clone().cpu() for name, value in everything.items()}


def test_a_step_is_the_cpus(sysu):
    losses, memories, states = [], [], []
    for gpu in ("-1", GPU):
        training = start_training(sysu, "--gpu", gpu)
        # With Adam's usual epsilon, rounding decides about weights that have hardly a gradient.
        training.optimizer.param_groups[0]["eps"] = 0.1
        begin = weights_and_gradients(training)
        rebuild_memory(training, 0)
        losses.append(take_steps(training, 1))
        memories.append({name: table.cpu() for name, table in tables(training).items()})
        states.append(weights_and_gradients(training))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*memories, rtol=1e-3, atol=1e-3)
    begin |= {name: torch.zeros_like(own) for name, own in states[0].items() if name.startswith("gradient")}
    assert_step(begin, states[1], states[0], tolerance=0.05)


def test_every_cache_gives_the_batches_of_the_cpu(sysu):
    epochs = []
    for flags in (
        ("--gpu", "-1"),
        *(("--gpu", GPU, "--cache", cache) for cache in ("device", "host", "disk")),
    ):
        loader = start_training(sysu, *flags).loader
        batches = [(*images.values(), labels) for images, labels in loader.epoch(0)]
        batches += [batch for modality in MODALITIES for batch in loader.memory_batches(modality, 7, 0)]
        epochs.append([[tensor.cpu() for tensor in batch] for batch in batches])
    cpu, first, *others = epochs
    torch.testing.assert_close(first, cpu, rtol=0, atol=1e-5)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_is_near_single_precision(sysu, amp):
    losses = []
    for precision in ("off", amp):
        training = start_training(sysu, "--gpu", GPU, "--amp", precision)
        assert training.scaler.is_enabled() == (precision == "fp16")
        seen = set()
        training.model.layer1.register_forward_hook(lambda _, __, out, seen=seen: seen.add(out.dtype))
        rebuild_memory(training, 0)
        losses.append(take_steps(training, 3)[0])  # of the first step: then Adam goes its own way
        assert seen == {training.dtype or torch.float32}
        assert all(table.dtype == torch.float32 for table in tables(training).values())
        assert all(weight.isfinite().all() for weight in training.model.state_dict().values())
    torch.testing.assert_close(*losses, rtol=0.1, atol=0.1)


def test_a_step_that_overflows_changes_no_weight_and_halves_the_scale(sysu):
    training = start_training(sysu, "--gpu", GPU, "--amp", "fp16")
    training.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**127)
    rebuild_memory(training, 0)
    before = deepcopy(dict(training.model.named_parameters()))
    take_steps(training, 1)
    assert training.scaler.get_scale() == 2.0**126
    for name, weight in training.model.named_parameters():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("cache", ["device", "host"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_the_host_waits_in_no_step(sysu, amp, cache):
    training = start_training(sysu, "--gpu", GPU, "--amp", amp, "--cache", cache)
    rebuild_memory(training, 0)

    def batches():
        """Four batches; from the end of the first step to the end of the last, waiting is an error."""
        for k, batch in enumerate(islice(training.loader.epoch(0), 4)):
            yield batch
            torch.cuda.set_sync_debug_mode("error" if k < 3 else "default")

    try:
        assert len(train_one_epoch(training, batches(), 0)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_need_no_more_memory_as_they_go_on(sysu):
    training = start_training(sysu, "--gpu", GPU)
    rebuild_memory(training, 0)
    take_steps(training, 2)
    peaks = []
    for steps in (2, 8):
        torch.cuda.reset_peak_memory_stats()
        take_steps(training, steps)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.02 * peaks[0]


def test_deterministic_runs_are_the_same(sysu, tmp_path):
    flags = [*tiny_flags(sysu), "--gpu", GPU, "--epochs", "2", "--deterministic", "--select", "last"]
    networks = []
    for name in ("first", "second"):
        done = run_script("train.py", *flags, "--name", name, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        networks.append(load_checkpoint(tmp_path / "save_model" / f"{name}_last.t")["net"])
    for name, value in networks[0].items():
        assert torch.equal(value, networks[1][name]), name


def test_a_check_says_how_much_of_the_gpu_a_run_takes(sysu, tmp_path):
    done = run_script("train.py", *tiny_flags(sysu), "--gpu", GPU, "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GPU memory: at most" in done.stdout


def test_evaluation_is_the_cpus(sysu):
    training = start_training(sysu, "--gpu", GPU)
    take_steps(training, 2)
    metrics, _ = evaluate(training)
    assert 0 < metrics.mAP <= 1
    evaluation, args = training.evaluation, training.args
    settings = None, args.test_batch, args.workers, training.processes
    features = evaluation.features(training.model, training.device, *settings)
    expected = evaluation.features(deepcopy(training.model).cpu(), torch.device("cpu"), *settings)
    for modality, own in features.items():
        assert own.device == training.device
        torch.testing.assert_close(own.cpu(), expected[modality], rtol=1e-3, atol=1e-3)
    # A network that has learnt nothing makes features that rounding can rank: score others.
    generator = torch.Generator().manual_seed(0)
    scored = {m: torch.randn(own.shape, generator=generator) for m, own in expected.items()}
    scored = {modality: own / own.norm(dim=1, keepdim=True) for modality, own in scored.items()}
    results = {}
    for device in ("cpu", training.device):
        on_device = {modality: own.to(device) for modality, own in scored.items()}
        [results[device]] = evaluation.score(on_device).values()
    for found, wanted in zip(results[training.device], results["cpu"], strict=True):
        assert found.cmc == pytest.approx(wanted.cmc)
        assert found[1:] == pytest.approx(wanted[1:])


def test_re_ranking_is_the_cpus():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(140, 64, generator=generator)
    query, gallery = (features / features.norm(dim=1, keepdim=True)).split((60, 80))
    found = k_reciprocal(query.to("cuda"), gallery.to("cuda"))
    assert found.device.type == "cuda"
    difference = (found.cpu() - k_reciprocal(query, gallery)).abs()
    # Neighbours are ranked in half precision, where rounding lets a few change places.
    assert difference.mean() < 1e-3
