"""Base class of maps between two distributions of embeddings: checks, normalisation, saving and loading."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pisces_rl.ot.costs import exact_products, unit

FORMAT = 1
NORMALISATIONS = ("none", "l2")
WEIGHTS, CARD = "map.safetensors", "map.json"


class TransportMap:
    """A map T with T#source close to target: `fit(source, target)`, then `T(x)`; `save(folder)`, `load(folder)`.

    Args:
        encoder: name of the model whose embeddings the map is for; `load` can refuse any other.
        normalise: "l2" scales inputs to unit length, in fitting and in use; "none" leaves them as they are.
    """

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()  # attributes saved to file, besides encoder and normalise
    _kinds: ClassVar[dict[str, type["TransportMap"]]] = {}

    def __init__(self, *, encoder: str = "", normalise: str = "none"):
        if normalise not in NORMALISATIONS:
            raise ValueError(f"normalise={normalise!r}: expected one of {', '.join(NORMALISATIONS)}.")
        self.encoder, self.normalise = encoder, normalise
        self.tensors: dict[str, Tensor] = {}
        self.report: dict = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        TransportMap._kinds[cls.kind] = cls

    def fit(self, source: Tensor, target: Tensor) -> "TransportMap":
        """Fit to points (n, D) and (m, D), which need not be paired; return self."""
        source, target = self.points("source", source), self.points("target", target)
        if source.shape[1] != target.shape[1]:
            raise ValueError(f"target: expected points of {source.shape[1]} dimensions, got {target.shape[1]}.")
        self.tensors = self._fit(source, target)
        self.tensors["dimension"] = torch.tensor(source.shape[1])
        self.report = {"source_points": len(source), "target_points": len(target), **self.report}
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D), differentiable with respect to x, in fp32 (fp64 for fp64)."""
        if not self.tensors:
            raise RuntimeError(f"this {type(self).__name__} is not fitted: call fit(source, target) or load one.")
        dimension = int(self.tensors["dimension"])
        if x.shape[-1:] != (dimension,):
            raise ValueError(f"x: expected (..., {dimension}), got {tuple(x.shape)}.")
        with exact_products(x.device):
            x = self.normalised(x if x.dtype == torch.float64 else x.float())
            return self._map(x.reshape(-1, dimension)).reshape(x.shape)

    def _fit(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the map's tensors, from normalised fp64 points on the CPU."""
        return {}

    def _map(self, x: Tensor) -> Tensor:
        return x

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """Return one of the map's tensors on the device and in the dtype of `like`."""
        return self.tensors[name].to(like)

    def points(self, name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 2 or len(x) < 2 or not x.isfinite().all():
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected two or more finite points (n, D), got {found}.")
        return self.normalised(x.detach().cpu().double())

    def normalised(self, x: Tensor) -> Tensor:
        """Return points (..., D) normalised as `normalise` says."""
        return unit(x) if self.normalise == "l2" else x

    def save(self, folder: str | Path) -> None:
        """Write map.safetensors (fp32) and map.json. The JSON comes last, so an interrupted save leaves no map."""
        if not self.tensors:
            raise RuntimeError(f"this {type(self).__name__} is not fitted: there is nothing to save.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD).unlink(missing_ok=True)
        tensors = {k: (v.float() if v.is_floating_point() else v).contiguous().cpu() for k, v in self.tensors.items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors makes it readable by the owner only
        card = {
            "format": FORMAT,
            "kind": self.kind,
            "encoder": self.encoder,
            "normalise": self.normalise,
            "settings": {name: getattr(self, name) for name in self.settings},
            "report": self.report,
        }
        temporary = folder / f"{CARD}.partial"
        temporary.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / CARD)

    @staticmethod
    def load(folder: str | Path, *, encoder: str | None = None) -> "TransportMap":
        """Load the map in a folder, of any kind. `encoder`: the encoder name that the map must have."""
        folder = Path(folder)
        if not (folder / CARD).is_file() or not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder} holds no map: {CARD} and {WEIGHTS} are needed.")
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS)
            kind, version, own_encoder = str(card["kind"]), card["format"], card["encoder"]
            settings = card["settings"] | {"encoder": own_encoder, "normalise": card["normalise"]}
            report = dict(card["report"])
        except (KeyError, TypeError, json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder}: the map is truncated or damaged ({error!r}).") from error
        if version != FORMAT or kind not in TransportMap._kinds:
            raise ValueError(f"{folder}: unknown map kind {kind!r} or format {version}.")
        if encoder is not None and own_encoder != encoder:
            raise ValueError(f"{folder}: encoder: the map is for {own_encoder!r}, not for {encoder!r}.")
        try:
            loaded = TransportMap._kinds[kind](**settings)
            loaded.tensors, loaded.report = tensors, report
            loaded(torch.zeros(1, int(tensors["dimension"])))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{folder}: the map is truncated or damaged ({error!r}).") from error
        return loaded
