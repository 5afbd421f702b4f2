"""Video-text models behind one small protocol, `VideoTextEncoder`: one file per model.

| file | model | matches |
|---|---|---|
| tiny_vtm.py | tiny-vtm, shipped, for ShapeMotion | yes |
| internvideo2.py | InternVideo2 stage 2, the paper's | yes |
| blip.py | BLIP over frames | yes |
| frames.py | CLIP, SigLIP over frames | no |
| xclip.py, videoprism.py, pe_video.py | X-CLIP, VideoPrism, PE-Video | no |
"""

from .encoder import TextFeatures, VideoFeatures, VideoTextEncoder
from .load_encoder import load_encoder
from .tiny_vtm import TinyVTM, TinyVTMConfig

__all__ = ["TextFeatures", "TinyVTM", "TinyVTMConfig", "VideoFeatures", "VideoTextEncoder", "load_encoder"]
