"""The names of rewards, and what each measures. This file imports nothing, so that shell completion is fast."""

ENCODER_REWARDS = {
    "ot_quality": "cosine between the video's embedding and the text's under a map of fit-map",
    "ot_semantic": "matching probability with attention fused with transport plans",
    "cosine": "ot_quality without a map",
    "matching": "ot_semantic without plans",
}
SCORERS = {
    "pickscore": "PickScore: human preferences between images for a prompt",
    "aesthetic": "LAION's aesthetic predictor on CLIP-L/14; ignores the prompt",
    "ocr": "the share of the prompt's quoted text that RapidOCR can read",
    "video_align": "VideoAlign: visual quality, motion quality and text alignment, by Qwen2-VL-2B",
    "hpsv3": "HPSv3: human preferences between images for a prompt, by Qwen2-VL-7B",
    "image_reward": "ImageReward: human preferences between images for a prompt, by BLIP",
    "unified_reward": "UnifiedReward 2.0: alignment, physics and style, written by Qwen2.5-VL",
    "video_score2": "VideoScore2: visual quality, text alignment and physical consistency, written by Qwen2.5-VL-7B",
    "motion_flow": "optical flow up to a threshold, without a model: a guard against frozen videos",
}
REWARDS = ENCODER_REWARDS | SCORERS
