r"""Crops of two photographs, 16 x 16 in colour: a second small set, to check what digits say.

    python main.py --config=configs/photos.py --workdir=runs/photos             dagger intervals
    python main.py --config=configs/photos.py:linear --workdir=runs/linear      linear intervals
    python main.py --config=configs/photos.py:flow --workdir=runs/flow          the flow model alone
    python main.py --config=configs/photos.py:meanflow --workdir=runs/mf \
        --config.init=runs/photos/checkpoints/3000                              JVP MeanFlow from it

All methods: configs/methods.py.

Cost: about 4 minutes on 2 CPU cores, as for digits: both have 16 tokens.
Data: 3,864 crops of the two photographs in scikit-learn (`dmf/data/bundled.py`).
Ours: all values come from configs/digits.py, except the curriculum's learning rate. It is half as
large, because with the larger rate scores went up and down from stage to stage.
"""

from configs import digits, methods


def get_config(argument: str = ""):
    """The config with the methods named in the argument, separated by commas."""
    names = methods.names_in(argument, "photos.py")
    config = digits.get_config()
    config.network.update(patch=4, num_classes=12)
    config.data.name = "photos"
    config.optimizer.learning_rate = 1e-3
    return methods.apply(config, names, "photos.py")
