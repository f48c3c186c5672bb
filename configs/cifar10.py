"""CIFAR-10, the paper's run: a pretrained flow model to a one-step generator by the discrete MeanFlow curriculum.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.init=runs/cifar10_flow
    python main.py --config=configs/cifar10.py:linear ...                     linear intervals instead of dagger

Cost: 2000 epochs = 96,000 steps of batch 1024; the paper reports .32 s per step on 4 H100 (34 GPU-hours). One-step FID in
the paper: 3.36 (dagger), 3.58 (linear). We have not run it to the end.

The paper's: path, targets, stop-gradient, K stages of equal length, batch, 2000 epochs, dagger.
Read off its Figure 1: K = 10 (plateaus of 200 epochs), q = 2, an EMA shorter than 1,600 steps.
Unknown in the paper, here the official MeanFlow CIFAR-10 recipe's: law of (r, t), p, eps, Adam 6e-4 with 9,600 steps of
warm-up, dropout, augmentation. The EMA ramp and the guard are ours.
Scores at stage boundaries: --config.run.protocol=cifar10 --config.run.features=inception
--config.run.reference=cifar10_reference.npz (README, Scores), here of run.score_samples images each.
To try the code path without the data: --config.data.mock --config.batch_size=8 --config.curriculum.length_unit=steps
--config.curriculum.stages=3 --config.curriculum.length=6 --config.run.sample_rows=2 --config.run.score_steps="(1,)"
--config.guard.action=off --config.guard.every_steps=0.
"""

from dataclasses import asdict

from dmf.config import complete
from dmf.errors import DmfError
from dmf.method.flow import TIME_LAWS

VARIANTS = ("dagger", "linear")


def get_config(variant: str = "dagger"):
    if variant not in VARIANTS:
        raise DmfError(f"configs/cifar10.py:{variant}: expected one of {', '.join(VARIANTS)}")
    return complete(
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
                stages=10, q=2.0, interval=variant, length=2000.0, length_unit="epochs"
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
