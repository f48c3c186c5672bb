r"""ImageNet 256x256 with guidance: one more stage after configs/imagenet256.py.

    python main.py --config=configs/imagenet256_guided.py --workdir=runs/imagenet256_guided \
        --config.init=runs/imagenet256 --config.data.data_dir=latents
    python main.py --config=configs/imagenet256_guided.py:B ...    another size: S, B, L or XL

It is configs/imagenet256.py:guided: the weights learn classifier-free guidance.

Cost: 40 epochs = 50,040 steps of batch 1024. The paper's JVP step takes 3.08 s on 4 H100, and two
forward passes take .43 s each. That makes 3.9 s per step and 220 GPU-hours. It is less here, as
only rows with r < t pay for the JVP. We have not run it.

Nearest published result: zhuyu-cs/MeanFlow tunes SiT-XL/2 for 20 epochs without guidance and for
40 with it, to one-step FID 4.52. After 110 epochs with guidance it has 15.50.

Not the paper's: its ImageNet run has no guidance, and we had no text of a stage that adds it.
From zhuyu-cs/MeanFlow: first without guidance, then with it, for 40 epochs. It found that tuning
with guidance at once is unstable.
From official MeanFlow, for XL/2, L/2 and B/2: omega, kappa and the times. The effective scales are
2.5, 2.5 and 2. None is known for S/2, which takes the values of B/2.
All else as in configs/imagenet256.py; the optimiser starts afresh.

A guided stage can also be the last stage of any curriculum:

    --config.curriculum.stages=4 --config.curriculum.kinds=all_pairs,discrete,jvp,guided_jvp
    --config.guidance.omega=0.2 --config.guidance.kappa=0.92 --config.guidance.t_end=0.75
"""

from configs import imagenet256
from dmf.errors import DmfError


def get_config(size: str = "XL"):
    """The config of configs/imagenet256.py:guided in one of its sizes."""
    if size not in imagenet256.GUIDANCE:
        known = ", ".join(imagenet256.GUIDANCE)
        raise DmfError(f"configs/imagenet256_guided.py:{size}: expected one of {known}")
    return imagenet256.get_config(f"{size},guided")
