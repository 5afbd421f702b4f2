"""Optical flow up to a threshold: a guard against frozen videos."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pisces_rl.rewards.contract import check_inputs, check_pixels
from pisces_rl.rewards.scorers.frame_scorer import scale

SHORT_SIDE = 256  # shorter side, in pixels, of the frames for which the threshold is given
RATE = 8.0  # frames per second between which the flow is computed
WINDOW, UNEXPLAINED = (9, 9), 0.25  # pixels; largest share of the change within them that the flow may leave
LUMA = (0.299, 0.587, 0.114)


class MotionFlow:
    """How much a video moves, in [0, 1]: 0 if it is frozen, 1 if it moves enough all the time.

        r = mean over t of min(m_t / T, 1),   T = threshold max(1, 8 / video_fps)

    m_t is the mean of the largest 5 % of the flow's magnitudes between frame t and the next one, in pixels of a frame
    whose shorter side is 256, at about 8 frames per second. Motion beyond T gains nothing, so the reward does not
    encourage shaking, and a video that freezes halfway scores half. The mean of m over t is recorded as
    `<name>_pixels`.

    Flow counts only where it explains the change: where moving the next frame back along the flow reduces the squared
    difference, over 9 x 9 pixels, to less than a quarter. Elsewhere it is 0. So noise, flicker and fades do not count
    as motion, even in plain areas, where flow alone mistakes noise for fast motion.

    The 5 %, the rate and the threshold of 6 come from VBench's dynamic degree (arXiv 2311.17982, vbench/
    dynamic_degree.py of github.com/Vchitect/VBench). VBench uses the flow of RAFT without this test, and reports only
    whether a quarter of a video's m_t exceed T. The flow here is classical, without weights: OpenCV's dense inverse
    search (Kroeger et al., arXiv 1603.03590) on grey frames, on the CPU. Larger frames are scaled down to a shorter
    side of 256; it takes about .06 s per pair of frames on one core.

    It misses motion beyond about a fifth of the shorter side between two frames, and motion inside plain surfaces. A
    cut counts as fast motion if one picture can be warped into the other. No gradients.
    Install it with `pip install 'pisces_rl[motion]'`.

    Args:
        video_fps: frames per second of the videos.
        threshold: for m at 8 frames per second.
        name: under which it is logged.

    Raises ImportError with that command if the package is missing, ValueError for videos of one frame, and whatever
    `check_inputs` and `check_pixels` raise.
    """

    def __init__(self, *, video_fps: float = 16.0, threshold: float = 6.0, name: str = "motion_flow"):
        if video_fps <= 0 or threshold <= 0:
            raise ValueError(f"video_fps={video_fps}, threshold={threshold}: both must be above 0.")
        try:
            import cv2
        except ImportError as error:
            raise ImportError(
                f"reward {name!r} takes its flow from OpenCV; install it: pip install 'pisces_rl[motion]' ({error})."
            ) from error
        cv2.setNumThreads(torch.get_num_threads())  # by default it would use all cores in each process
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._cv2 = cv2
        self.step, self.threshold = max(1, round(video_fps / RATE)), threshold * max(1.0, RATE / video_fps)
        self.__name__ = name

    def __call__(
        self, prompts: Sequence[str], videos: Tensor, log_extra: Callable | None = None, **columns: object
    ) -> list[float]:
        """Return B rewards of videos (B, F, 3, H, W) in [0, 1], F at least 2."""
        check_inputs(prompts, videos)
        check_pixels(videos)
        if videos.shape[1] < 2:
            raise ValueError("videos: motion_flow needs at least 2 frames, got 1.")
        motion = [self.magnitudes(video) for video in videos]
        if log_extra is not None:
            log_extra(f"{self.__name__}_pixels", [float(m.mean()) for m in motion])
        return [float(np.minimum(m / self.threshold, 1).mean()) for m in motion]

    def magnitudes(self, video: Tensor) -> np.ndarray:
        """Return m_t of a video (F, 3, H, W)."""
        frames = video.detach()[:: min(self.step, len(video) - 1)].float().cpu().clamp(0, 1)
        if min(frames.shape[-2:]) > SHORT_SIDE:
            size = [round(side * SHORT_SIDE / min(frames.shape[-2:])) for side in frames.shape[-2:]]
            frames = scale(frames, (size[0], size[1]))
        grey = (torch.einsum("fchw,c->fhw", frames, frames.new_tensor(LUMA)) * 255).round().byte().numpy()
        return np.array([self._largest(*pair) for pair in zip(grey[:-1], grey[1:])])

    def _largest(self, frame: np.ndarray, following: np.ndarray) -> float:
        cv2, flow = self._cv2, self._flow.calc(frame, following, None)
        rows, columns = np.indices(frame.shape, np.float32)
        moved = cv2.remap(following, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR)
        left, change = (cv2.blur((other - frame.astype(np.float32)) ** 2, WINDOW) for other in (moved, following))
        lengths = np.where(left < UNEXPLAINED * change, np.linalg.norm(flow, axis=-1), 0)
        count = max(1, int(0.05 * lengths.size))
        return float(np.partition(lengths, -count, None)[-count:].mean()) * SHORT_SIDE / min(frame.shape)
