"""A training run in a process of its own: `python training_process.py DIRECTORY PAUSE [section.field=value ...]`.

Prints one JSON line per optimizer step and leaves the weights in DIRECTORY/weights.pt; also under `accelerate launch`.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny_training import samples, task
from torch.nn.parallel import DistributedDataParallel

from training.trainer import Row, Trainer


def main() -> None:
    directory, pause, *overrides = Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    work = task(samples(), *overrides, noise=0.1)

    def report(row: Row) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        time.sleep(pause)

    accelerator = Accelerator(cpu=True)
    trainer = Trainer(work, directory, report=report, accelerator=accelerator)
    trainer.resume()
    trainer.run()
    left = [one for one in gc.get_objects() if type(one) is DistributedDataParallel]
    assert not left, "DDP would take the process group along, and two processes may then never end"
    if accelerator.is_main_process:
        torch.save(dict(work.objective.head.state_dict()), directory / "weights.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
