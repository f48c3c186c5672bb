r"""CIFAR-10, the paper's run: a flow model becomes a one-step generator by discrete MeanFlow.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 \
        --config.init=runs/cifar10_flow
    python main.py --config=configs/cifar10.py:linear ...      linear intervals instead of dagger

All methods: configs/methods.py.

Cost: 2000 epochs = 96,000 steps of batch 1024. The paper reports .32 s per step on 4 H100, which
is 34 GPU-hours. One-step FID in the paper: 3.36 (dagger), 3.58 (linear). We have not run it to
the end.

The paper's: path, targets, stop-gradient, K stages of equal length, batch, 2000 epochs, dagger.
Read off its Figure 1: K = 10 (plateaus of 200 epochs), q = 2, an EMA shorter than 1,600 steps.
Unknown in the paper, and here from the official MeanFlow recipe for CIFAR-10:

- the law of (r, t), p and eps
- Adam at 6e-4 with 9,600 steps of warm-up
- dropout and augmentation

Ours: the EMA ramp and the guard.

Scores at stage boundaries (docs/scores.md), of run.score_samples images each:

    --config.run.protocol=cifar10 --config.run.features=inception
    --config.run.reference=cifar10_reference.npz

To try the code path without the data:

    --config.data.mock --config.batch_size=8 --config.curriculum.length_unit=steps
    --config.curriculum.stages=3 --config.curriculum.length=6 --config.run.sample_rows=2
    --config.run.score_steps="(1,)" --config.guard.action=off --config.guard.every_steps=0
"""

from dataclasses import asdict

from configs import methods
from dmf.config import complete
from dmf.method.flow import TIME_LAWS


def get_config(argument: str = ""):
    """The config with the methods named in the argument, separated by commas."""
    names = methods.names_in(argument, "cifar10.py")
    config = complete(
        dict(
            seed=0,
            batch_size=1024,
            network=dict(
                kind="unet",
                channels=128,
                channel_mult=(2, 2, 2),
                blocks=4,
                attention_resolutions=(16,),
                dropout=0.2,
                augment_dim=6,
                interval_init="zero",
            ),
            data=dict(name="cifar10", flip=True, augment=0.12),
            times=asdict(TIME_LAWS["cifar_v1"]),
            loss=dict(p=0.75, eps=1e-3, product_rule=1.0, residual_scale="raw"),
            curriculum=dict(
                stages=10, q=2.0, interval="dagger", length=2000.0, length_unit="epochs"
            ),
            optimizer=dict(
                learning_rate=6e-4,
                warmup_steps=9600,
                decay_fraction=0.0,
                b1=0.9,
                b2=0.999,
                clip_norm=0.0,
            ),
            # decays .999, .9996, .9999, .99995 per step of 1,024 images
            ema=dict(
                halflife_images=(709e3, 1.774e6, 7.097e6, 14.195e6),
                rampup_ratio=0.05,
                evaluate=1.774e6,
            ),
            guard=dict(every_steps=1200, action="jvp"),
            run=dict(log_every_steps=100, checkpoint_every_steps=2400, score_steps=(1, 2, 4, 32)),
        )
    )
    return methods.apply(config, names, "cifar10.py")
