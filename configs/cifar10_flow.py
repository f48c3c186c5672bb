"""CIFAR-10, the flow model that the curriculum starts from: plain flow matching with the curriculum's own network.

    python main.py --config=configs/cifar10_flow.py --workdir=runs/cifar10_flow

Cost: 2000 epochs = 96,000 steps of batch 1024; about .30 s per step on 4 H100 follows from the paper's Table 3 (32 GPU-hours).
Expected: one-step FID about 330 (a flow model needs many steps); we have not run it to the end.

The paper's: 2000 epochs of flow matching before the curriculum. Unknown in the paper, here: the law of t (the same marginal
as in the curriculum), optimiser and EMA (as in configs/cifar10.py). The interval branch stays frozen at zero, so the
result satisfies u(z, r, t) = v(z, t) for every r, bit for bit.
"""

from configs import cifar10
from dmf.errors import DmfError


def get_config(variant: str = ""):
    if variant:
        raise DmfError(f"configs/cifar10_flow.py:{variant}: expected no variant")
    config = cifar10.get_config()
    config.curriculum.update(stages=1, kinds=("flow",), length=2000.0, length_unit="epochs")
    config.ema.evaluate = 7.097e6  # the start of the curriculum may be a long average
    return config
