"""Write a checkpoint in the released format: random weights of any configuration, or trained float32 ones quantised to int8.

    python scripts/write_checkpoint.py --config configs/models/grok-1.json --out DIR [--seed N]
    python scripts/write_checkpoint.py --config config.json --out DIR --from-npz weights.npz

DIR gets `config.json` and `ckpt-0/`. The arrays in the .npz are float32 under the released names, for instance
`transformer/decoder_layer_0/moe/linear` (see `engine/model/params.py`). Row-parallel matrices get `row_parallel_scale_groups` of the
configuration, or one group. One tensor is in memory at a time.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.released import specs_in_file_order
from engine.checkpoint.save import quantized_tensors, random_tensors, save_checkpoint
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError, EngineError


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a checkpoint in the released format.")
    parser.add_argument("--config", type=Path, required=True, help="a config.json")
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--from-npz", type=Path, help="trained float32 weights under the released names; without it they are random")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    arguments = parser.parse_args()
    try:
        write(arguments.config, arguments.out, npz=arguments.from_npz, seed=arguments.seed)
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(config_path: Path, out: Path, *, npz: Path | None, seed: int) -> None:
    """Write the checkpoint, then check it as a server would."""
    try:
        config = ModelConfig.from_json(json.loads(config_path.read_bytes()))
    except ValueError as error:
        raise ConfigError(f"{config_path} is not valid JSON: {error}") from None
    if npz is None:
        save_checkpoint(out, config, make_tensor=random_tensors(config, seed=seed))
    else:
        write_trained(npz, out, config)
    target = out / "config.json"
    if not (target.exists() and target.samefile(config_path)):
        shutil.copyfile(config_path, target)
    checkpoint = open_checkpoint(out, config)
    sizes = f"{len(checkpoint.tensors)} tensors, {checkpoint.num_params:,} parameters, {checkpoint.file_bytes:,} bytes"
    print(f"{sizes} in {checkpoint.directory}")


def write_trained(npz: Path, out: Path, config: ModelConfig) -> None:
    """Quantise and write the arrays of an .npz file, which must hold exactly the tensors of the configuration."""
    with np.load(npz, allow_pickle=False) as arrays:
        expected = {spec.name for spec in specs_in_file_order(config)}
        if differing := sorted(expected ^ set(arrays.files)):
            state = "is missing" if differing[0] in expected else "is not a tensor of this configuration"
            raise CheckpointError(f"{npz}: {differing[0]} {state}")
        save_checkpoint(out, config, make_tensor=quantized_tensors(config, read=arrays.__getitem__))


if __name__ == "__main__":
    sys.exit(main())
