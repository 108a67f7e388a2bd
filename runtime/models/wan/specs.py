"""Wan's published numbers: defaults per variant, how a variant is told from its config, latent statistics.

Source: Wan2.1 and Wan2.2 `wan/configs/*.py`, `wan/modules/vae.py`, `wan/modules/vae2_2.py`.
"""

from __future__ import annotations

from runtime.models.spec import Defaults

TEXT_LENGTH = 512

CAPTIONS = (
    "You write captions for Wan, a text-to-video model that was trained on long, factual captions. Rewrite the user's "
    "idea as one English paragraph of 80 to 100 words: first the subject with its look and what it does, then the "
    "surroundings, the light and the mood, then the style of the picture and the shot (close-up, wide shot and so on) "
    "and how the camera moves. Keep every fact that is given, quoted text word for word, add motion where none is "
    "named, and answer with the paragraph alone."
)

PUBLISHED: dict[str, Defaults] = {
    "wan2.1-t2v-1.3b": Defaults(width=832, height=480, num_frames=81, fps=16, steps=50, guidance=5.0, shift=5.0),
    "wan2.1-t2v-14b": Defaults(width=1280, height=720, num_frames=81, fps=16, steps=50, guidance=5.0, shift=5.0),
    "wan2.2-t2v-a14b": Defaults(
        width=1280, height=720, num_frames=81, fps=16, steps=40, guidance=4.0, guidance_2=3.0, shift=12.0
    ),
    "wan2.2-ti2v-5b": Defaults(width=1280, height=704, num_frames=121, fps=24, steps=50, guidance=5.0, shift=5.0),
    "wan2.1-i2v-14b": Defaults(width=832, height=480, num_frames=81, fps=16, steps=40, guidance=5.0, shift=3.0),
    "wan2.2-i2v-a14b": Defaults(
        width=1280, height=720, num_frames=81, fps=16, steps=40, guidance=3.5, guidance_2=3.5, shift=5.0
    ),
    "wan2.1-vace-1.3b": Defaults(width=832, height=480, num_frames=81, fps=16, steps=50, guidance=5.0, shift=16.0),
    "wan2.1-vace-14b": Defaults(width=1280, height=720, num_frames=81, fps=16, steps=50, guidance=5.0, shift=16.0),
}

REPOSITORIES = {
    "wan2.1-t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-t2v-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.2-t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}

VARIANTS = {  # (width, blocks, experts) -> name
    (1536, 30, 1): "wan2.1-t2v-1.3b",
    (5120, 40, 1): "wan2.1-t2v-14b",
    (5120, 40, 2): "wan2.2-t2v-a14b",
    (3072, 30, 1): "wan2.2-ti2v-5b",
}

OTHER_VARIANTS = {  # how known frames are taken -> the same
    "channels": {(5120, 40, 1): "wan2.1-i2v-14b", (5120, 40, 2): "wan2.2-i2v-a14b"},
    "control": {(1536, 30, 1): "wan2.1-vace-1.3b", (5120, 40, 1): "wan2.1-vace-14b"},
}

LATENT_STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {  # z_dim -> (mean, std)
    16: (
        (
            -0.7571,
            -0.7089,
            -0.9113,
            0.1075,
            -0.1745,
            0.9653,
            -0.1517,
            1.5508,
            0.4134,
            -0.0715,
            0.5517,
            -0.3632,
            -0.1922,
            -0.9497,
            0.2503,
            -0.2921,
        ),
        (
            2.8184,
            1.4541,
            2.3275,
            2.6558,
            1.2196,
            1.7708,
            2.6052,
            2.0743,
            3.2687,
            2.1526,
            2.8652,
            1.5579,
            1.6382,
            1.1253,
            2.8251,
            1.9160,
        ),
    ),
    48: (
        (
            -0.2289,
            -0.0052,
            -0.1323,
            -0.2339,
            -0.2799,
            0.0174,
            0.1838,
            0.1557,
            -0.1382,
            0.0542,
            0.2813,
            0.0891,
            0.1570,
            -0.0098,
            0.0375,
            -0.1825,
            -0.2246,
            -0.1207,
            -0.0698,
            0.5109,
            0.2665,
            -0.2108,
            -0.2158,
            0.2502,
            -0.2055,
            -0.0322,
            0.1109,
            0.1567,
            -0.0729,
            0.0899,
            -0.2799,
            -0.1230,
            -0.0313,
            -0.1649,
            0.0117,
            0.0723,
            -0.2839,
            -0.2083,
            -0.0520,
            0.3748,
            0.0152,
            0.1957,
            0.1433,
            -0.2944,
            0.3573,
            -0.0548,
            -0.1681,
            -0.0667,
        ),
        (
            0.4765,
            1.0364,
            0.4514,
            1.1677,
            0.5313,
            0.4990,
            0.4818,
            0.5013,
            0.8158,
            1.0344,
            0.5894,
            1.0901,
            0.6885,
            0.6165,
            0.8454,
            0.4978,
            0.5759,
            0.3523,
            0.7135,
            0.6804,
            0.5833,
            1.4146,
            0.8986,
            0.5659,
            0.7069,
            0.5338,
            0.4889,
            0.4917,
            0.4069,
            0.4999,
            0.6866,
            0.4093,
            0.5709,
            0.6065,
            0.6415,
            0.4944,
            0.5726,
            1.2042,
            0.5458,
            1.6887,
            0.3971,
            1.0600,
            0.3943,
            0.5537,
            0.5444,
            0.4089,
            0.7468,
            0.7744,
        ),
    ),
}
