"""Reads a training run's logs and names what is wrong with it: symptom, evidence, remedy.

eqvae diagnose runs/eq-vae

Works on a finished run and on one that is still training. Exit status 1 says that something was found. The limits are
own choice, and stand in docs/diagnose.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..training_utils.diagnosis import RULES, diagnose, read_curves
from . import command_parser


def main(argv: Sequence[str]) -> int:
    parser = command_parser("diagnose", __doc__)
    parser.add_argument("run", help="directory of a training run, finished or not")
    run = Path(parser.parse_args(argv).run)
    curves = read_curves(run)
    findings, unseen = diagnose(curves)
    looked = len(RULES) - len(unseen)
    print(f"{run}: {curves.steps} steps, {looked} sicknesses looked for, {len(findings)} found.")
    for finding in findings:
        print(f"\n{finding.symptom}\n  evidence: {finding.evidence}\n  remedy: {finding.remedy}")
    if unseen:
        print(f"\nNot looked for, since the logs do not say: {', '.join(unseen)}.")
    return 1 if findings else 0
