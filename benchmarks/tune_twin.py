"""The search of `tune.py` as one writes it with Optuna and PyTorch; prints one JSON document.

The same U-Net, windows, batches, optimiser, schedule and space, values drawn by the same sampler with the same seed,
the same validation. All windows are held in memory. Checkpoints, history, figures and continuation are left out, which
the command writes beside its training.

    python benchmarks/tune_twin.py CONFIG.toml SPACE.toml --trials 8
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from torch_side import torch_unet

from jaxtrain.config import TrainConfig
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.training_data import TrainingSet
from jaxtrain.settings import read_train_config

UNLABELLED = 255


class Windows:
    """All windows of the training and validation part in memory, normalised, channels last."""

    def __init__(self, prepared: TrainingSet) -> None:
        import torch

        statistics = prepared.statistics()
        mean = torch.tensor(statistics.mean, dtype=torch.float32)[:, None, None]
        std = torch.tensor(statistics.std, dtype=torch.float32)[:, None, None]
        self.parts: dict[str, tuple[Any, Any]] = {}
        for part in ("train", "validation"):
            read = prepared.reader.read(prepared.plan.parts[part].rows)
            seen = torch.from_numpy(np.asarray(read["observed"], bool))[:, None]
            image = (torch.from_numpy(read["image"].astype(np.float32)) - mean) / std * seen
            label = torch.from_numpy(read["label"].astype(np.int64))
            self.parts[part] = (image.contiguous(memory_format=torch.channels_last), label)


def train(windows: Windows, config: TrainConfig, values: dict[str, float], *, bands: int, classes: int) -> float:
    """Train one network and return its accuracy on the labelled pixels of the validation part."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    torch.manual_seed(config.run.seed)
    rng = np.random.default_rng(config.run.seed)
    unet = torch_unet(bands, classes, config.model.width, config.model.depth)
    head = nn.Sequential(nn.Dropout(values["model.dropout"]), unet.head)
    unet.head = head
    network = unet.to(memory_format=torch.channels_last)
    rate, decay, jitter = values["optim.learning_rate"], values["optim.weight_decay"], values["data.jitter"]
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
    steps, warm = config.run.steps, config.optim.warmup_steps

    def share(step: int) -> float:
        rest = (step - warm) / max(1, steps - warm)
        return step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * rest))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    image, label = windows.parts["train"]
    order = np.concatenate(
        [rng.permutation(len(image)) for _ in range(-(-steps * config.run.batch_size // len(image)))]
    )
    network.train()
    for step in range(steps):
        chosen = torch.from_numpy(order[step * config.run.batch_size : (step + 1) * config.run.batch_size])
        x, y = image[chosen], label[chosen]
        for number in range(len(x)):  # each window gets a turn of its own
            quarter, mirror = int(rng.integers(4)), bool(rng.integers(2))
            x[number], y[number] = torch.rot90(x[number], quarter, (1, 2)), torch.rot90(y[number], quarter)
            if mirror:
                x[number], y[number] = x[number].flip(2), y[number].flip(1)
        drawn = torch.from_numpy(rng.uniform(-jitter, jitter, (2, len(x), bands, 1, 1)).astype(np.float32))
        x = (x * (1 + drawn[0]) + drawn[1]).contiguous(memory_format=torch.channels_last)
        loss: Any = cross_entropy(network(x), y, ignore_index=UNLABELLED)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.optim.clip_norm or math.inf)
        optimiser.step()
        schedule.step()
    network.eval()
    image, label = windows.parts["validation"]
    right = total = 0
    with torch.no_grad():
        for start in range(0, len(image), config.run.batch_size):
            part = slice(start, start + config.run.batch_size)
            known = label[part] != UNLABELLED
            right += int(((network(image[part]).argmax(1) == label[part]) & known).sum())
            total += int(known.sum())
    return right / total


def main() -> None:
    import optuna

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("space", type=Path)
    parser.add_argument("--trials", type=int, default=8)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = read_train_config([args.config])
    prepared = open_training_data(config.data.cube).prepare(config, None, None)
    windows, space = Windows(prepared), tomllib.loads(args.space.read_text())

    def objective(trial: optuna.Trial) -> float:
        values = {
            name: trial.suggest_float(name, entry["low"], entry["high"], log=entry.get("log", False))
            for name, entry in space.items()
        }
        return train(windows, config, values, bands=len(prepared.bands), classes=len(prepared.classes.names))

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=config.run.seed))
    study.optimize(objective, n_trials=args.trials)
    print(json.dumps({"best": study.best_value, "trials": [{"value": t.value, **t.params} for t in study.trials]}))


if __name__ == "__main__":
    main()
