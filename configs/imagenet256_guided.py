r"""ImageNet 256x256 with guidance: a stage after configs/imagenet256.py that puts classifier-free guidance into the weights.

    python main.py --config=configs/imagenet256_guided.py --workdir=runs/imagenet256_guided --config.init=runs/imagenet256 \
        --config.data.data_dir=latents
    python main.py --config=configs/imagenet256_guided.py:B ...     another size of SiT: S, B, L or XL

Cost: 40 epochs = 50,040 steps of batch 1024. The paper's JVP step of 3.08 s on 4 H100 and two forward passes of .43 s make
3.9 s (220 GPU-hours), less as only rows with r < t pay for the JVP here. We have not run it. Nearest published:
zhuyu-cs/MeanFlow tunes SiT-XL/2 for 20 epochs without and 40 with guidance to one-step FID 4.52; after 110 with guidance it is
15.50.

Not the paper's: its ImageNet run has no guidance, and no text of a stage that adds it was at hand. First without, then with
guidance, and 40 epochs: zhuyu-cs/MeanFlow, which found tuning with guidance at once unstable. omega, kappa and the times:
official MeanFlow for XL/2, L/2 and B/2 (effective scale 2.5, 2.5, 2); none is known for S/2, which takes B's. Label dropout
.1, optimiser, law of (r, t) and all else as in configs/imagenet256.py; the optimiser starts afresh.

The same as the last stage of any curriculum: --config.curriculum.stages=4 --config.guidance.omega=0.2
--config.guidance.kappa=0.92 --config.guidance.t_end=0.75
--config.curriculum.kinds=trajectory,discrete,jvp,guided_jvp.
"""

from configs import imagenet256
from dmf.errors import DmfError

GUIDANCE = {
    "XL": dict(omega=0.2, kappa=0.92, t_start=0.0, t_end=0.75),
    "L": dict(omega=0.2, kappa=0.92, t_start=0.0, t_end=0.8),
    "B": dict(omega=1.0, kappa=0.5, t_start=0.0, t_end=1.0),
    "S": dict(omega=1.0, kappa=0.5, t_start=0.0, t_end=1.0),
}
VARIANTS = ("XL", "L", "B", "S")


def get_config(variant: str = "XL"):
    if variant not in VARIANTS:
        raise DmfError(
            f"configs/imagenet256_guided.py:{variant}: expected one of {', '.join(VARIANTS)}"
        )
    config = imagenet256.get_config(variant)
    config.curriculum.update(stages=1, kinds=("guided_jvp",), length=40.0, length_unit="epochs")
    config.guidance.update(GUIDANCE[variant])
    return config
