r"""CIFAR-10 from any flow model: configs/cifar10.py with the network of a converted directory.

    python main.py --mode=convert --kind=edm --source=edm-cifar10-32x32-uncond-vp.pkl \
        --out=edm_vp --align_steps=10000
    python main.py --config=configs/cifar10_from.py:edm_vp --workdir=runs/cifar10_edm

The argument is the directory; it sets config.network and config.init. It is for EDM, rectified
flow and TorchCFM, whose networks differ from the network of configs/cifar10.py.

Cost and provenance of all other values: see configs/cifar10.py. Nobody has tuned them for these
networks, and we have not run them. Augmentation is off unless the network takes its six labels.
"""

from dataclasses import asdict

from configs import cifar10
from dmf import pretrained
from dmf.config import complete
from dmf.errors import DmfError


def get_config(folder: str = ""):
    """The config that starts from the converted directory `folder`."""
    if not folder:
        raise DmfError(
            "configs/cifar10_from.py: expected a converted directory behind a colon, as in "
            "cifar10_from.py:edm_vp"
        )
    _, stored = pretrained.open_folder(folder)
    network, _ = pretrained.described(stored)
    values = cifar10.get_config().to_dict()
    values.update(network=asdict(network), init=folder)
    if getattr(network, "augment_dim", 0) != 6:
        values["data"]["augment"] = 0.0
    return complete(values)
