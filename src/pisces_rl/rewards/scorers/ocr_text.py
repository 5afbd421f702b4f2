"""OCR: does a video show the text that its prompt puts in quotation marks?"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pisces_rl.rewards.contract import check_inputs, check_pixels
from pisces_rl.rewards.scorers.frame_scorer import spread

#: Double quotation marks of any kind; single ones only where they cannot be apostrophes.
QUOTED = re.compile(r"""["“„]([^"“”„]*)["”“]|«([^«»]*)»|「([^「」]*)」|(?<!\w)['‘]([^'‘’]+)['’](?!\w)""")

LONGEST_SIDE = (
    960  # pixels, as in PaddleOCR; RapidOCR's default enlarges small frames to 736: two to seven times the work
)


class OCRText:
    """The share of the quoted text that can be read, in [0, 1].

        r = mean over quoted texts and frames of max(0, 1 - d / n)

    n is the length of a quoted text, d the smallest edit distance (insertions, deletions, substitutions) between it
    and any substring of the text read in the frame: other text in the picture costs nothing, and gains only by the
    letters it shares. Both are compared without case and spaces, with lines joined in reading order. Flow-GRPO (arXiv
    2505.05470, section 4.1) uses the distance to the whole text that is read, and like this reward gives 1 if that
    contains the quoted text. A prompt without quoted text gets None.

    RapidOCR reads upright text on the CPU (PP-OCRv6 small, Chinese and Latin letters; the models are part of its
    package) and keeps each line of at least 50 % confidence. Frames longer than 960 pixels are scaled down. It takes
    about a quarter of a second for a frame of 480 x 832 on one core. Install it with `pip install 'pisces_rl[ocr]'`.

    Args:
        frames: frames to read per video, evenly spaced, first and last included.
        name: under which it is logged.

    Raises ImportError with that command if the package is missing, and whatever `check_inputs` and `check_pixels`
    raise.
    """

    def __init__(self, *, frames: int = 4, name: str = "ocr"):
        if frames < 1:
            raise ValueError(f"frames={frames}: expected at least 1.")
        try:
            import onnxruntime  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                f"reward {name!r} reads text with RapidOCR; install it: pip install 'pisces_rl[ocr]' ({error})."
            ) from error
        threads = torch.get_num_threads()  # by default ONNX Runtime would use all cores in each process
        settings: dict[str, Any] = {
            f"EngineConfig.onnxruntime.{kind}_op_num_threads": count
            for kind, count in (("intra", threads), ("inter", 1))
        }
        settings |= {"Det.limit_type": "max", "Det.limit_side_len": LONGEST_SIDE}
        self._ocr = RapidOCR(params=settings | {"Global.use_cls": False, "Global.log_level": "error"})
        self.frames, self.__name__ = frames, name

    def __call__(self, prompts: Sequence[str], videos: Tensor, **columns: object) -> list[float | None]:
        """Return B shares for B prompts and videos (B, F, 3, H, W) in [0, 1]; None if a prompt has no quoted text."""
        check_inputs(prompts, videos)
        check_pixels(videos)
        wanted = [quoted_texts(prompt) for prompt in prompts]
        picks = spread(videos.shape[1], self.frames)
        return [self._share(texts, video[picks]) if texts else None for texts, video in zip(wanted, videos)]

    def _share(self, texts: Sequence[str], frames: Tensor) -> float:
        images = (frames.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        shares = [readable_share(text, read) for read in map(self.read, images) for text in texts]
        return sum(shares) / len(shares)

    def read(self, image: np.ndarray) -> str:
        """Read all text of an image (H, W, 3), bytes, line by line, normalised by `comparable`."""
        lines = self._ocr(np.ascontiguousarray(image[..., ::-1])).txts  # it expects BGR
        return comparable("".join(lines or ()))


def quoted_texts(prompt: str) -> list[str]:
    """Return the texts between quotation marks, normalised by `comparable`, without empty ones."""
    found = [comparable("".join(groups)) for groups in QUOTED.findall(prompt)]
    return [text for text in found if text]


def comparable(text: str) -> str:
    """Normalise text for comparison: Unicode's compatibility form, without case and white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def readable_share(wanted: str, read: str) -> float:
    """Return max(0, 1 - d / n) for a text of n letters, d its smallest edit distance to a substring of what was read.

    Sellers' recurrence: D[i, j] is the distance of the first i letters to a substring that ends at j, so D[0, j] = 0
    and d = min over j of D[n, j].
    """
    distances = np.arange(len(wanted) + 1)
    best = distances[-1]
    for letter in read:
        before, distances = distances, np.zeros_like(distances)
        for i, own in enumerate(wanted, start=1):
            distances[i] = min(before[i] + 1, distances[i - 1] + 1, before[i - 1] + (own != letter))
        best = min(best, distances[-1])
    return 1 - float(best) / len(wanted)
