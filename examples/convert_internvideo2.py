"""Convert the official checkpoint of InternVideo2 stage 2 (1B) once, to a folder that any reward can load.

    python examples/convert_internvideo2.py --checkpoint InternVideo2-stage2_1b-224p-f4.pt --output ./internvideo2
    python examples/fit_ot_map.py --encoder ./internvideo2 --dataset clips.jsonl --output_dir outputs/map

The pickle is read with `weights_only`, so it cannot run code. The weights are saved as safetensors in fp16, together
with BERT's tokenizer (from the Hub or a folder). Missing or unknown weights and wrong shapes are errors.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pisces_rl.rewards.encoders.internvideo2 import InternVideo2, InternVideo2Config

WRAPPERS = ("module", "model", "state_dict")  # keys under which training code stores the weights


def convert(
    checkpoint: str | Path, output: str | Path, tokenizer: PreTrainedTokenizerBase, config: InternVideo2Config
) -> InternVideo2:
    """Load official weights into a new model and save it to `output`."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    while wrapped := [name for name in WRAPPERS if isinstance(state.get(name), Mapping)]:
        state = state[wrapped[0]]
    model = InternVideo2(config, tokenizer)
    model.load_official(dict(state))
    model.save(output)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the official .pt file")
    parser.add_argument("--output", required=True, help="folder of the converted model")
    parser.add_argument("--tokenizer", default="google-bert/bert-large-uncased", help="Hub id or folder")
    parser.add_argument(
        "--num_frames", type=int, default=8, help="frames per video; temporal positions are interpolated"
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    convert(args.checkpoint, args.output, tokenizer, InternVideo2Config(num_frames=args.num_frames))
    print(f"wrote {args.output}; load it with load_encoder({args.output!r})")


if __name__ == "__main__":
    main()
