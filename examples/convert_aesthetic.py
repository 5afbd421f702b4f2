"""Convert the published head of LAION's aesthetic predictor once, from a pickle to safetensors.

    python examples/convert_aesthetic.py --checkpoint sac+logos+ava1-l14-linearMSE.pth

The pickle lies in github.com/christophschuhmann/improved-aesthetic-predictor. It is read with `weights_only`, so that
it can run no code. Weights that are missing, unknown or of another shape are an error.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from pisces_rl.rewards.scorers.aesthetic_predictor import HEAD, head_of


def convert(checkpoint: str | Path, output: str | Path = HEAD) -> Path:
    """Read the published weights and write them to `output`, in fp32 and under their names."""
    head = head_of(torch.load(checkpoint, map_location="cpu", weights_only=True), checkpoint)
    output = Path(output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), output)
    output.chmod(output.parent.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read it
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the published .pth file")
    parser.add_argument("--output", default=HEAD, help="the converted file; by default where the reward looks for it")
    args = parser.parse_args()
    print(f'the head is in {convert(args.checkpoint, args.output)}: load_reward("aesthetic")')


if __name__ == "__main__":
    main()
