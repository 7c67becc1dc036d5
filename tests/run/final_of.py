"""Builds the engine for each model folder and writes and proves its `final/`: `python -m ... METHOD DTYPE FOLDER ..`.

One process for all folders, which start-up would otherwise dominate. Prints what was checked, one JSON line per folder.
"""

import json
import sys
from pathlib import Path

import torch

from tests.conftest import ROOT


def main() -> None:
    method, dtype, *folders = sys.argv[1:]
    from ft_dist.config.load import validate
    from ft_dist.data.prepare.report import prepare_data
    from ft_dist.distributed import join_world, leave_world
    from ft_dist.engine.build import build_engine
    from ft_dist.model.tokenizer import configured_tokenizer
    from ft_dist.network.open import open_store
    from ft_dist.run.proof.final import write_and_prove

    world = join_world(open_store(timeout_s=60), timeout_s=60)
    for folder in folders:
        tree = {
            "model": {"path": folder, "dtype": dtype},
            "method": {"kind": method},
            "data": {"train": [str(ROOT / "configs/emails/test.jsonl")]},
            "output_dir": f"{folder}-run",
        }
        config = validate(tree)
        tokenizer, _ = configured_tokenizer(config.model, folder)
        train_set, _, _ = prepare_data(config, tokenizer, say=lambda line: None)
        engine = build_engine(config, world, folder=folder, tokenizer=tokenizer)
        with torch.no_grad():
            for _, parameter in engine.trainable():
                parameter += 0.02 * torch.randn_like(parameter)
        found, notes = write_and_prove(engine, tokenizer, config, base=folder, step=0, samples=train_set.store)
        print(json.dumps({"folder": Path(folder).name, **found, "notes": notes}), flush=True)
    leave_world()


if __name__ == "__main__":
    main()
