r"""Handwritten digits, the whole path on a laptop: flow matching, then discrete MeanFlow.

    python main.py --config=configs/digits.py --workdir=runs/digits             dagger intervals
    python main.py --config=configs/digits.py:linear --workdir=runs/linear      linear intervals
    python main.py --config=configs/digits.py:flow --workdir=runs/flow          the flow model alone
    python main.py --config=configs/digits.py:meanflow --workdir=runs/mf \
        --config.init=runs/digits/checkpoints/3000                              JVP MeanFlow from it

All methods: configs/methods.py.

Cost: about 4 minutes on 2 CPU cores.
Data: scikit-learn's 1,797 real 8 x 8 digits, three quarters of them for training.
The paper's (which has no digits): form of the curriculum, stop-gradient and target.
Ours, found on this set: K, q, p and the rates.
"""

from configs import methods
from dmf.config import complete


def get_config(argument: str = ""):
    """The config with the methods named in the argument, separated by commas."""
    names = methods.names_in(argument, "digits.py")
    config = complete(
        dict(
            seed=0,
            batch_size=64,
            label_dropout=0.1,
            network=dict(kind="dit", depth=3, width=96, heads=4, patch=2, num_classes=10),
            data=dict(name="digits", holdout_fraction=0.25),
            times=dict(
                pairing="sorted",
                t_mean=-0.4,
                t_std=1.0,
                r_mean=-0.4,
                r_std=1.0,
                r_neq_t_fraction=0.75,
            ),
            loss=dict(p=0.5, eps=1e-3, product_rule=1.0, residual_scale="raw"),
            curriculum=dict(
                stages=6,
                q=2.0,
                interval="dagger",
                length=2400.0,
                length_unit="steps",
                pretrain_length=3000.0,
            ),
            optimizer=dict(
                learning_rate=2e-3,
                warmup_steps=100,
                decay_fraction=0.4,
                pretrain_learning_rate=2e-3,
                pretrain_warmup_steps=100,
                pretrain_decay_fraction=0.4,
                b2=0.99,
                clip_norm=1.0,
            ),
            ema=dict(halflife_images=(2200.0, 4400.0), rampup_ratio=0.05, evaluate=4400.0),
            guard=dict(every_steps=200, action="jvp"),
            run=dict(
                log_every_steps=50,
                checkpoint_every_steps=500,
                score_samples=2000,
                score_steps=(1, 2, 4, 32),
                tensorboard=False,
            ),
        )
    )
    return methods.apply(config, names, "digits.py")
