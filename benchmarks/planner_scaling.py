"""Published scaling of ResNet-50 compared with predictions from a profile of each machine; nothing is fitted.

Sedona et al. (Remote Sensing 2019, 11(24) 3056, doi:10.3390/rs11243056) report near linear scaling of ResNet-50 on
BigEarthNet with Horovod at the Jülich Supercomputing Centre; the sequel (doi:10.1109/IGARSS39084.2020.9324237) goes to
128 GPUs with batches of 8,000. Their abstracts give no seconds, so linear scaling itself is what is compared. Goyal et
al. (2017, arXiv 1706.02677) train the same network on ImageNet and do give numbers: 90 % efficiency from 8 to 256 GPUs,
and steps 12 % longer on 352 GPUs than on 8. Every input is published, or is listed as assumed.
"""

# ruff: noqa: E501  # each input with its source

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness import Row, arguments, publish
from imagined import imagine

from jaxtrain.data.task import Task
from jaxtrain.planner.profile import Profile, read_profile
from jaxtrain.planner.scaling import Point, scaling_curves
from jaxtrain.planner.survey import Network

DATA_PARALLEL: tuple[dict[str, Any], ...] = ({},)
TOLERANCE = 0.1


@dataclass(frozen=True)
class Published:
    """One measurement that was published, and what is known of it."""

    name: str
    profile: str
    devices: tuple[int, ...]
    """Numbers of GPUs; efficiency is compared between the first that is published and the largest."""
    first: int
    last: int
    efficiency: float
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What the prediction starts from, and where each comes from."""


BIGEARTHNET = {
    "network": "ResNet-50, 12 bands, 43 classes: titles and abstracts of both papers; BigEarthNet (doi:10.1109/IGARSS.2019.8900532)",
    "images": "120 x 120 pixels in BigEarthNet; 128 x 128 here (assumed: this network's stem needs a multiple of 64)",
    "batch": "64 a GPU: 8,000 on 128 GPUs in the sequel's abstract",
    "precision": "float32 (assumed)",
    "optimiser": "SGD with momentum (assumed); it exchanges nothing",
    "norm": "statistics of each replica alone (assumed: what Horovod does)",
    "epoch": "590,326 patches, 60 % of them for training (assumed)",
}
PUBLISHED = (
    Published("Sedona 2019, V100 nodes", "v100-ib", (1, 4, 8, 16, 32, 64, 128), 1, 128, 1.0,
              {**BIGEARTHNET, "machine": "JUWELS: four V100 a node, EDR InfiniBand (hardwareluxx.de, 2018); two ports a node (profile)"}),
    Published("Sedona 2019, K80 nodes", "k80-ib", (1, 4, 8, 16, 32, 64, 128), 1, 128, 1.0,
              {**BIGEARTHNET, "machine": "JURECA: two K80 boards a node and one EDR port (assumed: the description was not read)"}),
    Published("Goyal 2017, P100 nodes", "p100-ethernet", (8, 16, 32, 64, 128, 256, 352), 8, 256, 0.9,
              {"network": "ResNet-50, 3 bands, 1000 classes, 224 x 224 pixels, 32 images a GPU, float32: sections 4.3 and 5.1",
               "norm": "statistics of each GPU alone: section 2.3", "optimiser": "SGD with Nesterov momentum: section 5.1",
               "machine": "eight P100 with NVLink and one 50 Gbit/s Ethernet port a server: section 4.3"}),
)  # fmt: skip

GROWTH = 1.12
"""Step on 352 GPUs, in steps on 8 (Goyal et al. 2017, section 5.5)."""
EPOCH_S, EPOCH_IMAGES = 16 * 60.0, 1.28e6
"""An epoch on 8 GPUs takes over 16 minutes (section 5.5)."""


def network(one: Published) -> Network:
    """Return the network of a publication, on data that are only described."""
    model = {"name": "resnet", "depth": 50, "width": 64, "stem": "large", "norm": "local"}
    if one.profile == "p100-ethernet":
        return imagine(bands=3, classes=1000, windows=1_280_000, task=Task(per_image=True), data={"patch": 224},
                       model=model, optim={"name": "sgd"}, run={"batch_size": 32})  # fmt: skip
    return imagine(bands=12, classes=43, windows=354_196, task=Task(per_image=True, several=True),
                   data={"patch": 128}, model=model, optim={"name": "sgd"}, run={"batch_size": 64})  # fmt: skip


def points(one: Published, profile: Profile) -> list[Point]:
    (curve,) = scaling_curves(network(one), one.devices, profile, families=DATA_PARALLEL)
    return list(curve.points)


def efficiency(found: list[Point], first: int, last: int) -> float:
    """Rate of each device among many, in that of each among few."""
    rate = {point.devices: point.images_per_s / point.devices for point in found}
    return rate[last] / rate[first]


def variants(profile: Profile) -> dict[str, Profile]:
    """The profile with each assumed number at another value: what an assumption is worth."""
    device = profile.device

    def device_with(**values: Any) -> Profile:
        return profile.model_copy(update={"device": device.model_copy(update=values)})

    def links(**factor: float) -> Profile:
        made = [link.model_copy(update={k: getattr(link, k) * v for k, v in factor.items()}) for link in profile.links]
        return profile.model_copy(update={"links": tuple(made)})

    return {
        "nothing is hidden (overlap 0)": profile.model_copy(update={"overlap": 0.0}),
        "half the bandwidth of all links": links(bandwidth=0.5),
        "ten times the latency": links(latency=10.0),
        "devices compute twice as fast": device_with(
            reached=min(1.0, 2 * device.reached),
            reached_bandwidth=1.0,
            bandwidth=device.bandwidth * 2 * device.reached_bandwidth,
        ),
        "no exchanges are joined (combined 0)": profile.model_copy(update={"combined": 0.0}),
    }


def rows_of(one: Published) -> list[Row]:
    profile = read_profile(one.profile)
    found = points(one, profile)
    predicted = efficiency(found, one.first, one.last)
    assumed = "; ".join(f"{name}: {text}" for name, text in one.inputs.items())
    rows = [
        Row(f"{one.name}: efficiency {one.first} to {one.last} GPUs, in the published one",
            predicted / one.efficiency, 1 - TOLERANCE, note=f"predicted {predicted:.3f}, published "
            f"{one.efficiency:.2f}{' (near linear)' if one.efficiency == 1 else ''}; {assumed}"),
        Row(f"{one.name}: the same, from above", predicted / one.efficiency, 1 + TOLERANCE, at_most=True),
    ]  # fmt: skip
    rows += [
        Row(f"{one.name}: efficiency on {point.devices} GPUs", efficiency(found, one.first, point.devices),
            note=f"step {1e3 * point.step_s:.1f} ms, batch {point.batch}, {point.images_per_s:.0f} images/s, "
            f"{point.sent_bytes / 1e6:.0f} MB sent, {point.peak_bytes / 1e9:.2f} GB")
        for point in found
    ]  # fmt: skip
    for name, other in variants(profile).items():
        rows.append(Row(f"{one.name}: efficiency if {name}", efficiency(points(one, other), one.first, one.last)))
    if one.first == 8:
        few, many = (next(point for point in found if point.devices == n) for n in (8, 352))
        growth = many.step_s / few.step_s
        note = f"predicted {growth:.3f}, published {GROWTH}"
        rows.append(Row(f"{one.name}: growth of a step from 8 to 352 GPUs, in the published one", growth / GROWTH,
                        1 + TOLERANCE, at_most=True, note=note))  # fmt: skip
        rows.append(Row(f"{one.name}: the same growth, from below", growth / GROWTH, 1 - TOLERANCE))
        published = EPOCH_S / (EPOCH_IMAGES / few.batch)
        rows.append(Row(f"{one.name}: step on 8 GPUs, in the published one", few.step_s / published,
                        note=f"predicted {few.step_s:.3f} s, published over {published:.3f} s"))  # fmt: skip
    return rows


def main() -> int:
    arguments(__doc__ or "")
    rows = [row for one in PUBLISHED for row in rows_of(one)]
    return 0 if publish("planner-scaling", rows, full=True) else 1


if __name__ == "__main__":
    sys.exit(main())
