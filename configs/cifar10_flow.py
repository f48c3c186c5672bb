"""CIFAR-10, the flow model that the curriculum starts from, in the curriculum's own network.

    python main.py --config=configs/cifar10_flow.py --workdir=runs/cifar10_flow

Cost: 2000 epochs = 96,000 steps of batch 1024. About .30 s per step on 4 H100 follows from the
paper's Table 3, which is 32 GPU-hours. Expected: one-step FID about 330, as a flow model needs
many steps. We have not run it to the end.

The paper's: 2000 epochs of flow matching before the curriculum.
Unknown in the paper: the law of t, optimiser and EMA. Here they come from configs/cifar10.py, so t
has the same marginal law. The evaluated average is ours.

The interval branch stays frozen at zero. So u(z, r, t) = v(z, t) for every r, bit for bit.
"""

from configs import cifar10
from dmf.errors import DmfError


def get_config(argument: str = ""):
    """The config of configs/cifar10.py:flow with a longer average."""
    if argument:
        raise DmfError(f"configs/cifar10_flow.py:{argument}: expected no variant")
    config = cifar10.get_config("flow")
    config.ema.evaluate = 7.097e6  # the start of the curriculum may be a long average
    return config
