"""The protocol between a reward server and its clients, version `PROTOCOL`.

GET /health answers JSON: {"protocol", "version" of pisces_rl, "state", "queue" (requests in the server), "scored"
(videos so far), "max_bytes", "rewards": {name: {"identity", "compares_videos", "columns"}}}, where `columns` are those
that the reward names, or null for all that JSON can carry.

POST /score/NAME takes a safetensors file. Its tensor `request` holds the UTF-8 bytes of JSON: {"protocol", "prompts":
B strings, "columns": {name: B values}, "state": a few numbers of the trainer's state, or null, "size": [F, H, W]}. The
videos are one tensor `videos` (B, F, 3, H, W), fp32 in [0, 1] or uint8 in 0..255, or the bytes of B mp4 files as uint8
tensors `video_0`, `video_1`, ... of "size". `max_bytes` limits the body, and the decoded frames of mp4 files in fp32.
The answer is JSON: {"protocol", "reward": NAME, "identity", "values": B numbers or nulls, "extras": {name: B values},
"metrics": {name: numbers}}.

An error is JSON {"error": a sentence} with an HTTP status: 400 the request is wrong, 401 the token is wrong, 404 there
is no such reward, 413 too large, 500 the reward failed, 503 the queue is full or the server is stopping (with
Retry-After).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pisces_rl.media import load_video, mp4_bytes
from pisces_rl.rewards.contract import check_inputs

PROTOCOL = 1
STATE = ("global_step", "max_steps", "epoch")  # the trainer state sent along, for rewards that follow a schedule
FRAMES = ("lossless", "mp4")


class TooLarge(ValueError):
    """A request exceeds the size limit."""


@dataclass
class ScoreRequest:
    """Videos (B, F, 3, H, W) in fp32, with their prompts and columns, and the part of the trainer's state to send."""

    prompts: list[str]
    videos: Tensor
    columns: dict[str, list]
    state: dict[str, float] | None

    def rows(self, start: int, end: int) -> "ScoreRequest":
        columns = {name: values[start:end] for name, values in self.columns.items()}
        return ScoreRequest(self.prompts[start:end], self.videos[start:end], columns, self.state)


@dataclass
class ScoreAnswer:
    """B values, None where the reward does not apply, and what the reward recorded."""

    values: list[float | None]
    extras: dict[str, list]
    metrics: dict[str, list[float]]


def pack_request(request: ScoreRequest, frames: str = "lossless") -> bytes:
    """Pack a request into a body.

    Raises:
        ValueError: a column holds values that JSON cannot carry unchanged, or `frames` is not one of `FRAMES`.
    """
    if frames not in FRAMES:
        raise ValueError(f"frames={frames!r} must be one of {', '.join(map(repr, FRAMES))}.")
    for name, values in request.columns.items():
        if not is_plain(list(values)):
            raise ValueError(
                f"column {name!r}, which the reward names, holds values that JSON cannot carry unchanged (images, "
                "arrays, tuples, bytes). Remove it from the reward's arguments, or use the reward inside the run."
            )
    head = {
        "protocol": PROTOCOL,
        "prompts": list(request.prompts),
        "columns": request.columns,
        "state": request.state,
        "size": [request.videos.shape[1], *request.videos.shape[-2:]],
    }
    tensors = {"request": _as_tensor(json.dumps(head).encode())}
    if frames == "mp4":
        for row, video in enumerate(request.videos):
            tensors[f"video_{row}"] = _as_tensor(mp4_bytes(video, min_size=0))
    else:
        tensors["videos"] = request.videos.contiguous()
    return save(tensors)


def unpack_request(body: bytes, max_bytes: float = math.inf) -> ScoreRequest:
    """Unpack a request from a body.

    Raises:
        TooLarge: the mp4 files would exceed `max_bytes` as fp32 frames, judging by the request; they are not decoded.
        ValueError: it is not a request, has another protocol, or is inconsistent; the message says what is wrong.
    """
    try:
        tensors = load(body)
        head = json.loads(tensors.pop("request").numpy().tobytes())
        protocol = head["protocol"]
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the body is not a safetensors file with a JSON tensor 'request' ({error!r}).") from error
    if protocol != PROTOCOL:
        raise ValueError(other_protocol("the client", protocol, "this server"))
    try:
        prompts, columns, state, (count, height, width) = (
            head[key] for key in ("prompts", "columns", "state", "size")
        )
        if "videos" in tensors:
            videos = tensors["videos"]
            if videos.dtype not in (torch.float32, torch.uint8):
                raise ValueError(f"videos: expected float32 or uint8, got {videos.dtype}.")
            videos = videos.float().div_(255) if videos.dtype == torch.uint8 else videos
        else:  # mp4_bytes added a row or column to odd sides
            size = decoded_bytes((len(prompts), count, 3, height, width))
            if size > max_bytes:
                raise TooLarge(too_large(size, max_bytes))
            shape = (count, height + height % 2, width + width % 2)
            parts = [load_video(tensors[f"video_{row}"].numpy().tobytes(), shape=shape) for row in range(len(prompts))]
            videos = torch.stack([part[..., :height, :width] for part in parts])
        check_inputs(prompts, videos)
        for name, values in columns.items():
            if not isinstance(values, list) or len(values) != len(prompts):
                raise ValueError(f"column {name!r}: expected a list of {len(prompts)} values.")
        if state is not None and not set(state) <= set(STATE):
            raise ValueError(f"state: expected some of {', '.join(STATE)}, got {state}.")
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the request is inconsistent: {error}") from error
    return ScoreRequest(prompts, videos, columns, state)


def pack_answer(name: str, identity: str, answer: ScoreAnswer) -> bytes:
    """Pack an answer into a body.

    Raises:
        ValueError: an extra holds values that JSON cannot carry unchanged.
    """
    for extra, values in answer.extras.items():
        if not is_plain(values):
            raise ValueError(
                f"log_extra({extra!r}) got values that JSON cannot carry unchanged; record numbers, "
                "strings, or lists of them."
            )
    return json.dumps(
        {
            "protocol": PROTOCOL,
            "reward": name,
            "identity": identity,
            "values": answer.values,
            "extras": answer.extras,
            "metrics": answer.metrics,
        }
    ).encode()


def unpack_answer(body: bytes, name: str, identity: str, prompts: Sequence[str]) -> ScoreAnswer:
    """Unpack and check an answer.

    Raises:
        ValueError: it is not an answer, or belongs to another protocol, reward or weights; there are not B values,
            each a finite number or null; extras or metrics are malformed.
    """
    try:
        answer = json.loads(body)
        protocol = answer["protocol"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the answer is not JSON of a reward server ({error!r}): {body[:200]!r}") from error
    if protocol != PROTOCOL:
        raise ValueError(other_protocol("the server", protocol, "this client"))
    if (answer.get("reward"), answer.get("identity")) != (name, identity):
        raise ValueError(
            f"the answer is from reward {answer.get('reward')!r}, identity {answer.get('identity')}; "
            f"expected {name!r}, {identity}: the reward or its weights have changed since the start."
        )
    values, extras, metrics = (answer.get(key) for key in ("values", "extras", "metrics"))
    if not isinstance(values, list) or len(values) != len(prompts):
        got = len(values) if isinstance(values, list) else repr(values)
        raise ValueError(f"the answer has {got} values for {len(prompts)} videos.")
    for row, value in enumerate(values):
        if value is not None and not (_is_number(value) and math.isfinite(value)):
            raise ValueError(
                f"the answer has {value!r} for video {row}, prompt {prompts[row]!r}; expected a finite "
                "number, or null where the reward does not apply."
            )
    if not isinstance(extras, dict) or any(
        not isinstance(own, list) or len(own) != len(values) for own in extras.values()
    ):
        raise ValueError(f"the answer's extras are not lists of {len(values)} values.")
    if not isinstance(metrics, dict) or any(
        not isinstance(own, list) or not all(map(_is_number, own)) for own in metrics.values()
    ):
        raise ValueError("the answer's metrics are not lists of numbers.")
    return ScoreAnswer(values, extras, metrics)


def other_protocol(who: str, protocol: object, here: str) -> str:
    return f"{who} speaks version {protocol!r} of the protocol, {here} {PROTOCOL}; install the same pisces_rl on both."


def too_large(size: int, max_bytes: int) -> str:
    return (
        f"the request has {size} bytes, but this server accepts {max_bytes}; raise its --max_mb, or send fewer "
        "videos at once."
    )


def decoded_bytes(shape: Sequence[int]) -> int:
    """Return the bytes of videos of this shape in fp32."""
    return 4 * math.prod(shape)


def is_plain(value: object) -> bool:
    """Return whether JSON preserves the value: None, bool, int, float, str, and lists and dicts of them."""
    if isinstance(value, dict):
        return type(value) is dict and all(type(k) is str and is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return type(value) is list and all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
