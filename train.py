"""Train on SYSU-MM01, RegDB or LLCM, on one GPU, the CPU, or many GPUs:

    python train.py --dataset sysu --lr 0.00035 --batch-size 8 --gpu 0
    python train.py --dataset regdb --trial 1 --gpu 0
    torchrun --nproc_per_node 4 train.py --dataset sysu

Writes <run>_best.t and <run>_last.t under save_model/, a log under log/<dataset>_log/ and TensorBoard events
under log/vis_log/.
"""

import argparse
import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from augmentation import normalize
from devices import Processes
from eval_metrics import Metrics
from flags import checked_settings, parse_training_args, trials_of
from loss import WEIGHTS, mce_loss
from model import extract_features
from runs import Run, environment, existing, open_run
from training import SELECTION, Training
from utils import MODALITIES, Stopped, UserError, log, log_to_terminal, run_script, stop_signals

Batches = Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]

TERMS = tuple(WEIGHTS)
LOOK_EVERY = 20  # steps between two looks at the device's losses: each look waits for the device


class NotFinite(UserError):
    """A loss or a weight is infinite or not a number."""


def learning_rate(epoch: int, base: float, warmup: int, decay: tuple[int, int]) -> float:
    """The rate of an epoch (from 0): linear warm-up, base, a tenth after decay[0], a hundredth from decay[1].

    `>` here and `>=` there is how the released code has it, and its results were made so: docs/method.md, 7.
    """
    if epoch < warmup:
        return base * (epoch + 1) / warmup
    if epoch >= decay[1]:
        return base * 0.01
    return base * 0.1 if epoch > decay[0] else base


def train_one_epoch(training: Training, batches: Batches, steps: int, epoch: int) -> torch.Tensor:
    """The steps of an epoch, one a batch; returns their losses (steps, 7) on the CPU: the total, then TERMS.

    batches: ({modality: (n, 3, H, W)}, labels (n,)) on the device. Raises NotFinite at a loss that is not
    finite.
    """
    network, bank, optimizer, scaler = training.network, training.bank, training.optimizer, training.scaler
    device, dtype = training.device, training.dtype
    network.train()
    history = torch.zeros(steps, 1 + len(TERMS), device=device)
    progress = tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None)
    for step, (images, labels) in enumerate(progress):
        training.check_stop(together=step % LOOK_EVERY == 0)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = network(torch.cat([images["visible"], images["aux"]]), images["infrared"])  # (3n, D)
        visible, aux, infrared = F.normalize(outputs.float()).chunk(3)  # (n, D) each
        features = {"visible": visible, "infrared": infrared, "aux": aux}
        total, terms = mce_loss(features, labels, bank, proxies=training.args.proxies)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(total).backward()
        bank.update(*training.of_all_processes(features, labels))
        scaler.step(optimizer)
        scaler.update()

        history[step] = torch.stack([total, *(terms[name] for name in TERMS)]).detach()
        if step % LOOK_EVERY == 0:
            refuse_non_finite(history[: step + 1], epoch)
            progress.set_postfix(loss=f"{history[step, 0].item():.3f}", refresh=False)
    refuse_non_finite(history, epoch)
    return history.cpu()


def refuse_non_finite(history: torch.Tensor, epoch: int) -> None:
    """NotFinite naming the first step and the terms whose loss is not finite."""
    finite = history.isfinite()
    if not finite.all():
        step = int((~finite.all(1)).nonzero()[0])
        bad = [name for name, good in zip(("total", *TERMS), finite[step].tolist(), strict=True) if not good]
        raise NotFinite(f"the loss is not finite at epoch {epoch + 1}, step {step + 1}: {', '.join(bad)}")


def refuse_non_finite_weights(model: torch.nn.Module, epoch: int) -> None:
    """NotFinite naming the first weight that is not finite."""
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
    for name, good in zip(state, finite, strict=True):
        if not good:
            raise NotFinite(f"the weight {name} is not finite after epoch {epoch + 1}")


def refuse_small_disk(model: torch.nn.Module, run: Run, later: int) -> None:
    """UserError if the checkpoints of the run and of `later` ones of --trial all do not fit on the disk."""
    size = 4 * sum(value.numel() for value in model.state_dict().values())
    need = (1 + 3 + 3) * size  # best, last with Adam's two moments, and last again while it is written
    need += later * (1 + 3) * size
    folder = run.last.parent
    free = shutil.disk_usage(existing(folder)).free
    free += sum(path.stat().st_size for path in (run.best, run.last) if path.exists())  # they make room
    log.info("checkpoints need %.0f MB in %s, where %.0f MB are free", need / 1e6, folder, free / 1e6)
    if free < need:
        raise UserError(f"--model-path {folder}: {need / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB free")


def show(metrics: Metrics) -> str:
    """Metrics in per cent, in one line."""
    values = {"rank-1": metrics.cmc[0], "rank-10": metrics.cmc[9], "mAP": metrics.mAP, "mINP": metrics.mINP}
    return "  ".join(f"{name} {100 * value:.2f}" for name, value in values.items())


def evaluate(training: Training, epoch: int) -> bool:
    """Evaluate after `epoch` epochs, note the result in training, and say whether it is the best so far."""
    metrics = training.latest = training.evaluate()
    result = {"epoch": epoch, "rank1": float(metrics.cmc[0]), "mAP": metrics.mAP, "mINP": metrics.mINP}
    choosing = epoch > 0 and training.args.select != "last"
    is_best = choosing and (training.best is None or result["rank1"] > training.best["rank1"])
    if is_best:
        training.best = result
    log.info("  %s: %s%s", training.protocol.title, show(metrics), "  (best so far)" if is_best else "")
    return is_best


def fit(training: Training, run: Run) -> None:
    """The epochs: rebuild the memory, train, evaluate, save."""
    args, processes, loader = training.args, training.processes, training.loader
    writer = SummaryWriter(run.events, purge_step=training.start + 1) if processes.rank == 0 else None
    if args.epochs == 0:
        evaluate(training, 0)  # the network as training would find it
        if writer is not None:
            run.save(training.state(0, run.log_size()), False, SELECTION[args.select])
    for epoch in range(training.start, args.epochs):
        began = time.perf_counter()
        rate = learning_rate(epoch, args.lr, args.warmup_epochs, args.decay_epochs)
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        training.check_stop(together=True)
        training.rebuild_memory(epoch)
        rebuilt = time.perf_counter()
        try:
            losses = train_one_epoch(training, loader.epoch(epoch), len(loader.batches), epoch)
            processes.share(training.model.buffers())  # running statistics, as the checkpoint has them
            refuse_non_finite_weights(training.model, epoch)
        except NotFinite as error:
            good = (
                f"the last good checkpoint is {run.last}, after epoch {epoch}"
                if epoch
                else "no epoch was good"
            )
            raise NotFinite(f"{error}; {good}") from error
        seconds = time.perf_counter() - rebuilt

        means = dict(zip(("loss", *TERMS), losses.mean(0).tolist(), strict=True))
        speed = 3 * args.batch_size * args.num_pos * processes.world_size * len(losses) / seconds
        waiting = loader.wait_seconds / seconds
        log.info(
            "epoch %d/%d: loss %.3f (%s), rate %.2e; memory %.1f s, steps %.1f s, %.0f images/s, "
            "waiting for input %.1f %%",
            epoch + 1, args.epochs, means["loss"], ", ".join(f"{name} {means[name]:.3f}" for name in TERMS),
            rate, rebuilt - began, seconds, speed, 100 * waiting,
        )  # fmt: skip
        scalars = {f"loss/{name}": value for name, value in means.items()}
        scalars |= {"rate": rate, "images a second": speed, "share of waiting for input": waiting}

        number, is_best = epoch + 1, False
        due = number > args.eval_start and number % args.eval_every == 0
        if due or number == args.epochs:
            training.check_stop()
            is_best = evaluate(training, number)
            latest = training.latest
            scalars |= {"rank-1": latest.cmc[0], "mAP": latest.mAP, "mINP": latest.mINP}
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, number)
            writer.flush()  # before the checkpoint, which a resumed run goes on from: no gap
            run.save(training.state(number, run.log_size()), is_best, SELECTION[args.select])
        training.load_test_images()  # a broken one is told after the first epoch, not after hours
        processes.wait()
    if writer is not None:
        writer.close()
    if training.best:
        log.info(
            "best: %s, epoch %d, rank-1 %.2f", run.best, training.best["epoch"], 100 * training.best["rank1"]
        )
    log.info("finished: %s", run.last)


def train_run(
    args: argparse.Namespace, trial: int, later: int, processes: Processes, check_stop: Callable[..., None]
) -> None:
    """Train one run, from its start or its checkpoint, to its last epoch; or check that this can be done.

    later: how many trials follow this one.
    """
    if args.resume and args.overwrite:
        raise UserError("--overwrite would replace the run that --resume continues: give one of them")
    args, run, checkpoint = open_run(args, trial)
    if checkpoint:
        checked_settings(checkpoint["args"], args.resume)
    trial = int(args.trial)  # a checkpoint's own, where --resume names one
    first = processes.rank == 0
    if first:
        run.refuse_unwritable()
        if not args.check:
            run.acquire()
    try:
        if checkpoint and checkpoint["epoch"] >= args.epochs and not args.check:
            log.info("%s is finished: %d epochs", run.last, checkpoint["epoch"])
            return
        if checkpoint is None and first and not args.overwrite:
            run.refuse_to_overwrite(args.epochs)
        training = Training(args, trial, checkpoint, processes, check_stop)
        if first:
            refuse_small_disk(training.model, run, later)
        if first and not args.check:
            if checkpoint is None:
                run.remove()
            run.open_log(checkpoint["log_size"] if checkpoint else 0)
        for line in [*environment(), *training.describe(), f"run: {run.last}"]:
            log.info("%s", line)
        check(training) if args.check else fit(training, run)
    except torch.OutOfMemoryError as error:
        sizes = f"--batch-size {args.batch_size} --num-pos {args.num_pos} or --test-batch {args.test_batch}"
        raise UserError(f"the GPU's memory is too small for {sizes} at {args.img_h}x{args.img_w}") from error
    except OSError as error:
        raise UserError(f"{error.filename or run.events}: {error.strerror or error}") from error
    finally:
        if first:
            run.release()


def check(training: Training) -> None:
    """One step on a real batch, one evaluation batch, and what they took; no checkpoint and no log."""
    bank, loader, device = training.bank, training.loader, training.device
    bank.reset({modality: torch.randn_like(bank.shared.proxies) for modality in MODALITIES})
    began = time.perf_counter()
    losses = train_one_epoch(training, islice(loader.epoch(0), 1), 1, 0)
    log.info(
        "one step: loss %.3f, %.1f s (the first is the slowest)", losses[0, 0], time.perf_counter() - began
    )
    training.load_test_images()
    images = torch.from_numpy(training.evaluation.pixels["infrared"][: training.args.test_batch])
    features = extract_features(
        training.model.eval(), [normalize(images.to(device))], "infrared", training.dtype
    )
    log.info("one evaluation batch: %d images, %d features each", *features.shape)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        log.info("GPU memory: at most %.1f of %.1f GB", torch.cuda.max_memory_reserved() / 1e9, total / 1e9)
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        log.info("memory of this process: at most %.1f GB", peak / 1e9)
    log.info("memory bank: %.0f MB", 8 * bank.shared.proxies.nbytes / 1e6)
    log.info("check passed: no checkpoint and no log was written")


def main(args: argparse.Namespace) -> int | None:
    """Train the runs that args ask for; 143 or 130 when SIGTERM or Ctrl-C stopped one."""
    processes = Processes()
    log_to_terminal(quiet=processes.rank > 0)
    if processes.world_size > 1 and args.typed.get("gpu", -1) >= 0:
        raise UserError(
            f"--gpu {args.gpu}: of several processes each takes the GPU of its own number: leave it out"
        )
    with stop_signals(patience=10 if processes.world_size > 1 else 0) as received:

        def check_stop(together: bool = False) -> None:
            """Raise Stopped after a signal; of several processes only where all of them ask together."""
            signum = received[0] if received else 0
            if processes.world_size > 1:
                signum = processes.largest(signum) if together else 0
            if signum:
                raise Stopped(signum)

        try:
            if args.trial == "all" and args.overwrite and not args.check and processes.rank == 0:
                for trial in trials_of(args):  # all now: a trial left of the former run would count as done
                    _, run, _ = open_run(args, trial)
                    run.acquire()
                    run.remove()
                    run.release()
            trials = trials_of(args)
            for later, trial in zip(reversed(range(len(trials))), trials, strict=True):
                if args.trial == "all":
                    log.info("RegDB, trial %d of 10", trial)
                train_run(args, trial, later, processes, check_stop)
        except Stopped as stopped:
            words = [word for word in sys.argv if word != "--overwrite"]
            resume = [] if "--resume" in " ".join(words) else ["--resume", "auto"]
            launcher = ["torchrun", "--nproc_per_node", str(processes.world_size)]
            words = [*(launcher if processes.world_size > 1 else ["python"]), *words, *resume]
            log.info("stopped by %s; to continue: %s", stopped, shlex.join(words))
            processes.stop()
            return 128 + stopped.signum
        except RuntimeError as error:
            if processes.world_size > 1 and "by peer" in str(error):  # closed, or reset
                raise UserError("another process has ended: its own message says why") from error
            raise
    processes.stop()
    return None


if __name__ == "__main__":
    run_script(main, parse_training_args)
