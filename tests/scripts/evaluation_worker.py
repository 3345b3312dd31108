"""Runs the evaluation scripts several times in one launch: `torchrun evaluation_worker.py PLAN.json`.

PLAN is a list of [path of a script, its arguments]. Starting Python costs more than all of it.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from accelerate import PartialState

if __name__ == "__main__":
    torch.set_num_threads(1)
    # The processes stay together until the last run is over.
    PartialState.destroy_process_group = lambda self: None
    for script, words in json.loads(Path(sys.argv[1]).read_text()):
        runpy.run_path(script)["main"](words)
