"""Published scorers trained on human judgements, as rewards; load them by name with `load_reward`. One file per model.

| name | file | model |
|---|---|---|
| pickscore | pickscore.py | CLIP-H |
| aesthetic | aesthetic_predictor.py | CLIP-L/14 and a head |
| ocr | ocr_text.py | RapidOCR |
| video_align | video_align.py | Qwen2-VL-2B |
| hpsv3 | hpsv3.py | Qwen2-VL-7B |
| image_reward | image_reward.py | BLIP |
| unified_reward | unified_reward.py | Qwen2.5-VL |
| video_score2 | video_score2.py | Qwen2.5-VL-7B |
| motion_flow | motion_flow.py | none: OpenCV's optical flow |

Shared code is in `frame_scorer`, `qwen2_vl_reward` and `generative_judge`; `published_weights` checks the names of
weights before reading them.
"""
