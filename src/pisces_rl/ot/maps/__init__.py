from pisces_rl.ot.maps.closed_form import IdentityMap, LinearMap, MeanShiftMap, RegressedMap, ShuffledMap
from pisces_rl.ot.maps.entropic import EntropicMap
from pisces_rl.ot.maps.fit_best import BestMap, MapWarning, fit_best
from pisces_rl.ot.maps.neural import NeuralMap
from pisces_rl.ot.maps.transport_map import TransportMap

__all__ = [
    "BestMap",
    "EntropicMap",
    "IdentityMap",
    "LinearMap",
    "MapWarning",
    "MeanShiftMap",
    "NeuralMap",
    "RegressedMap",
    "ShuffledMap",
    "TransportMap",
    "fit_best",
]
