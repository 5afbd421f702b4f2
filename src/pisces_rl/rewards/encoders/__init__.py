"""Video-text models behind one small protocol, `VideoTextEncoder`: one file a model."""

from .base import TextFeatures, VideoFeatures, VideoTextEncoder
from .tiny_vtm import TinyVTM, TinyVTMConfig

__all__ = ["TextFeatures", "TinyVTM", "TinyVTMConfig", "VideoFeatures", "VideoTextEncoder"]
