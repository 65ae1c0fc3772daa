"""Build everything a run trains with: data, network, memory bank, optimiser and evaluation."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data_manager
from data_loader import IdentityBatches, TrainLoader
from data_manager import DATASETS
from devices import Processes, autocast_dtype, seed_globally, select_device
from engine.settings import loss_weights
from eval_metrics import Metrics
from evaluation.protocols import Evaluation, Protocol
from loss import MCE, Baseline
from memory import MemoryBank
from model import TwoStreamResNet, load_strictly
from readers.arrays import TrainingImages, open_training_arrays, training_arrays
from readers.own import draw_split
from utils import (
    MODALITIES,
    UserError,
    log,
)

SELECTION = {
    "test": "the epoch with the highest mAP on the test split, as in the literature: optimistic",
    "val": "the epoch with the highest mAP on the val ids, which are not trained on",
    "last": "the last epoch, without selection",
}


@dataclass
class Training:
    """Everything a run trains with, and its progress."""

    args: argparse.Namespace
    processes: Processes
    device: torch.device
    dtype: torch.dtype | None  # autocast's; None: float32
    loader: TrainLoader
    model: TwoStreamResNet  # the network that is evaluated and saved
    network: nn.Module  # model as a step calls it: wrapped for several processes, compiled
    bank: MemoryBank
    loss: nn.Module  # MCE, or a baseline with its classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    evaluation: Evaluation
    protocol: Protocol
    data: str  # a line that describes the training data
    epoch: int = 0  # completed epochs
    evaluated: int = -1  # the value of epoch at the last evaluation; -1: none yet
    best: dict | None = None  # {"epoch", "rank1", "mAP", "mINP"} of the best evaluation
    latest: Metrics | None = None  # metrics of the last evaluation

    @property
    def images_per_step(self) -> int:
        """Images that a step of all processes together passes through the network."""
        own = self.args.batch_size * self.args.num_pos * len(self.loader.modalities)
        return own * self.processes.world_size

    def state(self) -> dict:
        """The checkpoint. cmc, mAP and mINP are from the last evaluation."""
        latest = self.latest
        return {
            "net": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "evaluated": self.evaluated,
            "args": vars(self.args),
            "cmc": latest and latest.cmc.tolist(),
            "mAP": latest and latest.mAP,
            "mINP": latest and latest.mINP,
            "best": self.best,
            "selection": "the run's last checkpoint",
            "protocol": self.protocol.title,
            "data": self.data,
            "world_size": self.processes.world_size,
        }

    def describe(self) -> list[str]:
        """Describe the run in a few lines, for its log."""
        args, device = self.args, self.device
        name = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        precision = str(self.dtype or torch.float32).removeprefix("torch.")
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        settings = (f"{key} {value}" for key, value in sorted(vars(args).items()) if key != "command")
        modalities = len(self.loader.modalities)
        return [
            f"settings: {', '.join(settings)}",
            self.data,
            f"input: border {args.pad}; pixels on the {self.loader.cache}",
            f"network: {args.arch}, {args.stem} stem, {millions:.1f} million weights, from {args.weights}",
            f"device: {device.type} ({name}), {precision}, {self.processes.world_size} process(es)",
            f"a step: {args.batch_size} identities x {args.num_pos} images x {modalities} in each process; "
            f"an epoch: {len(self.loader.batches)} steps",
            f"evaluation: {self.protocol.title}; the result: {SELECTION[args.select]}",
        ]


def build_training(args: argparse.Namespace, checkpoint: dict | None, processes: Processes) -> Training:
    """Build everything a run trains with, and seed this process.

    Args:
        args: the run's settings.
        checkpoint: where to continue; None: from the start.
        processes: the processes of the run, which join here.

    Raises:
        UserError: data, weights, a device or a checkpoint that cannot be used.
    """
    device = select_device(args.gpu)
    dtype = autocast_dtype(args.amp, device)
    processes.start(device)
    seed_globally(args.seed, args.deterministic)

    root = data_manager.dataset_root(args.dataset, args.data_path)
    if args.test_identities is not None:
        if processes.rank == 0:
            draw_split(root, args.test_identities, args.seed)
        processes.barrier()
    protocol = Protocol(args.dataset, args.mode, split="val" if args.select == "val" else "test")
    trials = [int(args.trial)] if args.trial else DATASETS[args.dataset].trials
    evaluation = Evaluation(root, [protocol], trials, args.img_h, args.img_w)
    loader, data = build_loader(args, root, device, processes)
    evaluation.pixel_range = args.pixel_range  # as the training images are decoded

    weights = None if args.weights == "none" or checkpoint else args.weights
    model = TwoStreamResNet(args.arch, args.stem, weights)
    if checkpoint:
        load_strictly(model, checkpoint["net"], f"--resume {args.resume}")
    model.to(device, memory_format=torch.channels_last)
    network = model
    if processes.world_size > 1:
        network = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
        network.broadcast_buffers = False  # a step reads no buffers; train.py broadcasts them once per epoch
    bank, loss = build_loss(args, loader.batches.classes, model.dim, device)
    training = Training(
        args=args,
        processes=processes,
        device=device,
        dtype=dtype,
        loader=loader,
        model=model,
        network=torch.compile(network) if args.compile else network,
        bank=bank,
        loss=loss,
        optimizer=torch.optim.Adam(
            [*model.parameters(), *loss.parameters()], args.lr, weight_decay=5e-4, fused=True
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        evaluation=evaluation,
        protocol=protocol,
        data=data,
    )
    if checkpoint:
        restore(training, checkpoint)
    evaluation.load(args.workers, processes)  # so that broken test images are found before training
    return training


def build_loss(
    args: argparse.Namespace, num_classes: int, dim: int, device: torch.device
) -> tuple[MemoryBank, nn.Module]:
    """Build the memory bank (the baselines do not use it) and the loss.

    Args:
        args: the run's settings.
        num_classes: C, the number of training identities.
        dim: D, the dimension of a feature.
        device: where both live.
    """
    bank = MemoryBank(
        num_classes, dim, args.temperature, args.shared_momentum, args.momentum, args.update == "hard", device
    )
    weights = loss_weights(args)
    if args.loss == "mce":
        return bank, MCE(bank, weights, args.proxies, args.margin)
    return bank, Baseline(args.loss, num_classes, dim, weights, args.margin).to(device)


def build_loader(
    args: argparse.Namespace, root: Path, device: torch.device, processes: Processes
) -> tuple[TrainLoader, str]:
    """Build the training input, and a line that describes the training data.

    Args:
        args: the run's settings; args.pixel_range is filled in, see load_training_data.
        root: the dataset's folder.
        device: where batches are made.
        processes: process 0 decodes the training images if needed; the others wait for it.

    Raises:
        UserError: training images or arrays that cannot be used.
    """
    if processes.rank > 0:
        processes.barrier()  # until process 0 has made the training arrays, if they are missing
    images, labels, fingerprint = load_training_data(args, root)
    if processes.rank == 0:
        processes.barrier()
    batches = IdentityBatches(
        labels, args.batch_size, args.num_pos, args.seed, processes.rank, processes.world_size
    )
    recipe = DATASETS[args.dataset].recipe
    modalities = [modality for modality in MODALITIES if not (args.no_aux and modality == "aux")]
    loader = TrainLoader(images, labels, batches, recipe, device, args.seed, args.cache, args.pad, modalities)
    counts = ", ".join(f"{(array >= 0).sum()} {modality}" for modality, array in labels.items())
    size = f"{loader.height}x{loader.width}"
    data = f"{batches.classes} identities, {counts} images of {size}, {fingerprint[:16]}"
    return loader, f"training data: {data}"


def load_training_data(args: argparse.Namespace, root: Path) -> tuple[dict, dict, str]:
    """Load training images {modality: (N, H, W, 3) uint8}, labels {modality: (N,) int64} and a fingerprint.

    Label -1 marks an image of a val id, which --select val does not train on. args.pixel_range is set to the
    range that the images were decoded with, so that the checkpoint records it for test.py.
    """
    samples = data_manager.train_samples(args.dataset, root, args.trial and int(args.trial))
    paths = {modality: samples[modality].paths for modality in samples}
    folder = args.array_path or root
    if args.dataset == "sysu":
        arrays = open_training_arrays(folder, args.img_h, args.img_w, paths, "train", root, args.pixel_range)
    else:  # decoded on the first run, opened on the next
        prefix = f"train_{args.trial}" if args.dataset == "regdb" else "train"
        pids = sorted({int(pid) for pid in samples["visible"].pids})
        source = TrainingImages(paths, data_manager.class_labels(samples), pids)
        arrays = training_arrays(
            folder, source, args.img_h, args.img_w, args.workers, prefix, args.pixel_range
        )
    args.pixel_range = arrays.pixel_range and list(arrays.pixel_range)
    if args.select != "val":
        return arrays.images, arrays.labels, arrays.fingerprint or "of unknown origin"
    if arrays.pids is None:
        raise UserError(
            f"--select val: {folder} does not record the ids of its training arrays: run pre_process_sysu.py"
        )
    train = data_manager.train_samples(args.dataset, root, split="train")
    kept = np.flatnonzero(np.isin(arrays.pids, train["visible"].pids))  # labels
    labels = {
        modality: np.where(np.isin(array, kept), np.searchsorted(kept, array), -1)
        for modality, array in arrays.labels.items()
    }
    return arrays.images, labels, arrays.fingerprint


def restore(training: Training, checkpoint: dict) -> None:
    """Restore the state of a run from its checkpoint; build_training has loaded the network."""
    resume, processes = f"--resume {training.args.resume}", training.processes
    if (count := checkpoint["world_size"]) != processes.world_size:
        raise UserError(
            f"{resume}: the run has {count} process(es), not {processes.world_size}: "
            f"start it with torchrun --nproc_per_node {count}"
        )
    try:
        training.loss.load_state_dict(checkpoint["loss"])
        training.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty unless the run used fp16; --amp auto depends on the GPU
            training.scaler.load_state_dict(checkpoint["scaler"])
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{resume}: cannot restore the state of training: {error}") from error
    if checkpoint["data"] != training.data:
        counts, saved_counts = (str(data).rpartition(", ")[0] for data in (training.data, checkpoint["data"]))
        if training.args.dataset == "folder" and counts != saved_counts:  # two folders, one run's name
            raise UserError(f"{resume}: its {saved_counts}; not {counts}: give the new run a --name")
        log.warning("the training data has changed; the run started with %s", checkpoint["data"])
    training.epoch, training.evaluated = checkpoint["epoch"], checkpoint["evaluated"]
    training.best = checkpoint["best"]
    if checkpoint["cmc"]:
        training.latest = Metrics(np.array(checkpoint["cmc"]), checkpoint["mAP"], checkpoint["mINP"])
