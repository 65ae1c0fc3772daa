"""A run's settings, and what is built from them: data, network, memory bank, optimiser, evaluation."""

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
from eval_metrics import Metrics
from evaluation import Evaluation, Protocol
from loss import MCE, Baseline
from memory import MemoryBank
from model import TwoStreamResNet, load_strictly
from runs.settings import loss_weights
from storage.arrays import open_training_arrays, training_arrays
from storage.own_data import draw_split
from utils import (
    MODALITIES,
    UserError,
    log,
)

SELECTION = {
    "test": "the epoch with the highest mAP on the test split, as is the literature's habit: optimistic",
    "val": "the epoch with the highest mAP on the val ids, which are not trained on",
    "last": "the last epoch: none is chosen",
}


@dataclass
class Training:
    """What a run trains with, and how far it is."""

    args: argparse.Namespace
    processes: Processes
    device: torch.device
    dtype: torch.dtype | None  # autocast's; None: float32
    loader: TrainLoader
    model: TwoStreamResNet  # the weights that are evaluated and saved
    network: nn.Module  # the same as a step calls it: across processes, compiled
    bank: MemoryBank
    loss: nn.Module  # of a step: MCE, or a baseline with its classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    evaluation: Evaluation
    protocol: Protocol
    data: str  # the training data in one line
    epoch: int = 0  # how many epochs are trained
    evaluated: int = -1  # after how many of them the network was evaluated last; -1: never
    best: dict | None = None  # {"epoch", "rank1", "mAP", "mINP"} of the best evaluation
    latest: Metrics | None = None  # of the last evaluation

    def state(self) -> dict:
        """The checkpoint; cmc, mAP and mINP are those of the last evaluation."""
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
        """The run in a few lines, for its log."""
        args, device = self.args, self.device
        name = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        precision = str(self.dtype or torch.float32).removeprefix("torch.")
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        settings = (f"{key} {value}" for key, value in sorted(vars(args).items()) if key != "command")
        return [
            f"settings: {', '.join(settings)}",
            self.data,
            f"input: border {args.pad}; pixels on the {self.loader.cache}",
            f"network: {args.arch}, {args.stem} stem, {millions:.1f} million weights, from {args.weights}",
            f"device: {device.type} ({name}), {precision}, {self.processes.world_size} process(es)",
            f"a step: {args.batch_size} identities x {args.num_pos} images x 3 in each process; "
            f"an epoch: {len(self.loader.batches)} steps",
            f"evaluation: {self.protocol.title}; the result: {SELECTION[args.select]}",
        ]


def build_training(args: argparse.Namespace, checkpoint: dict | None, processes: Processes) -> Training:
    """Build what a run trains with, as it starts or as a checkpoint left it; seeds this process.

    Raises UserError for data, weights, a device or a checkpoint that a run cannot use.
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
        network.broadcast_buffers = False  # training reads none; train.py broadcasts them each epoch
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
    evaluation.load(args.workers, processes)  # broken test images are found before the first epoch
    return training


def build_loss(
    args: argparse.Namespace, num_classes: int, dim: int, device: torch.device
) -> tuple[MemoryBank, nn.Module]:
    """The memory bank, which a baseline leaves unused, and the loss."""
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
    """The training input, and the training data described in one line."""
    if processes.rank > 0:
        processes.barrier()  # until the first process has made the arrays, where they have to be made
    images, labels, fingerprint = load_training_data(args, root)
    if processes.rank == 0:
        processes.barrier()
    batches = IdentityBatches(
        labels, args.batch_size, args.num_pos, args.seed, processes.rank, processes.world_size
    )
    recipe = DATASETS[args.dataset].recipe
    modalities = [modality for modality in MODALITIES if not (args.no_aux and modality == "aux")]
    loader = TrainLoader(images, labels, batches, recipe, device, args.seed, args.cache, args.pad, modalities)
    counts = ", ".join(f"{(own >= 0).sum()} {modality}" for modality, own in labels.items())
    size = f"{loader.height}x{loader.width}"
    data = f"{batches.classes} identities, {counts} images of {size}, {fingerprint[:16]}"
    return loader, f"training data: {data}"


def load_training_data(args: argparse.Namespace, root: Path) -> tuple[dict, dict, str]:
    """Training images {modality: (N, H, W, 3) uint8}, labels {modality: (N,) int64} and a fingerprint.

    Label -1: an image of a val id, which --select val does not train on. args.pixel_range becomes the one
    that the images were decoded by, for the checkpoint, and so for test.py.
    """
    samples = data_manager.train_samples(args.dataset, root, args.trial and int(args.trial))
    paths = {modality: own.paths for modality, own in samples.items()}
    folder = args.array_path or root
    if args.dataset == "sysu":
        arrays = open_training_arrays(folder, args.img_h, args.img_w, paths, "train", root, args.pixel_range)
    else:  # decoded on the first run, opened on the next
        prefix = f"train_{args.trial}" if args.dataset == "regdb" else "train"
        pids = sorted({int(pid) for pid in samples["visible"].pids})
        labels = data_manager.class_labels(samples)
        arrays = training_arrays(
            folder, paths, labels, pids, args.img_h, args.img_w, args.workers, prefix,
            pixel_range=args.pixel_range,
        )  # fmt: skip
    args.pixel_range = arrays.pixel_range and list(arrays.pixel_range)
    if args.select != "val":
        return arrays.images, arrays.labels, arrays.fingerprint or "of unknown origin"
    if arrays.pids is None:
        raise UserError(
            f"--select val needs to know the ids behind the arrays in {folder}: run pre_process_sysu.py"
        )
    train = data_manager.train_samples(args.dataset, root, split="train")
    kept = np.flatnonzero(np.isin(arrays.pids, train["visible"].pids))  # labels
    labels = {
        modality: np.where(np.isin(own, kept), np.searchsorted(kept, own), -1)
        for modality, own in arrays.labels.items()
    }
    return arrays.images, labels, arrays.fingerprint


def restore(training: Training, checkpoint: dict) -> None:
    """Continue where a checkpoint of the same run was saved; its network is loaded already."""
    resume, processes = f"--resume {training.args.resume}", training.processes
    if (count := checkpoint["world_size"]) != processes.world_size:
        raise UserError(
            f"{resume}: its run has {count} process(es), this has {processes.world_size}: "
            f"start it with torchrun --nproc_per_node {count}"
        )
    try:
        training.loss.load_state_dict(checkpoint["loss"])
        training.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty unless the run is in fp16: --amp auto differs between GPUs
            training.scaler.load_state_dict(checkpoint["scaler"])
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{resume}: broken state of the optimiser: {error}") from error
    if checkpoint["data"] != training.data:
        log.warning("the data has changed: the run began with %s", checkpoint["data"])
    training.epoch, training.evaluated = checkpoint["epoch"], checkpoint["evaluated"]
    training.best = checkpoint["best"]
    if checkpoint["cmc"]:
        training.latest = Metrics(np.array(checkpoint["cmc"]), checkpoint["mAP"], checkpoint["mINP"])
