"""Crops of two photographs, 16 x 16 in colour: a second small set that every installation has, to try on it what digits say.

    python main.py --config=configs/photos.py --workdir=runs/photos             dagger intervals
    python main.py --config=configs/photos.py:linear --workdir=runs/linear      linear intervals
    python main.py --config=configs/photos.py:flow --workdir=runs/flow          the flow model alone
    python main.py --config=configs/photos.py:meanflow --workdir=runs/mf \
        --config.init=runs/photos/checkpoints/3000                              JVP MeanFlow from the same flow model

Cost: that of configs/digits.py, about 4 minutes on 2 CPU cores, as both have 16 tokens. Data: 3,864 crops of scikit-learn's
two photographs (`dmf/data/photos.py`). The curriculum's learning rate is half that of configs/digits.py, at which scores went
up and down from stage to stage here; all else is found on digits.
"""

from configs import digits
from dmf.errors import DmfError

VARIANTS = ("dagger", "linear", "flow", "meanflow")


def get_config(variant: str = "dagger"):
    if variant not in VARIANTS:
        raise DmfError(f"configs/photos.py:{variant}: expected one of {', '.join(VARIANTS)}")
    config = digits.get_config(variant)
    config.network.update(patch=4, num_classes=12)
    config.data.name = "photos"
    if variant != "flow":
        config.optimizer.learning_rate = 1e-3
    return config
