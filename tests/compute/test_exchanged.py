"""What ranks exchange: sums over ranks dealt by atoms, and atoms dealt by columns and back, at ranks of one machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

# Ranks are forked before torch has any thread. With four ranks some have none of two atoms.
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from globe.compute import ranks

def be_rank(number, count, atoms):
    dist.init_process_group("gloo", f"file://{sys.argv[1]}/{count}", rank=number, world_size=count)
    whole = torch.arange(atoms * 10.0).view(atoms, 2, 5)
    columns = slice(10 * number // count, 10 * (number + 1) // count)
    for all_atoms in (whole, whole.bfloat16()):
        own = all_atoms[ranks.atoms(atoms)]
        assert torch.equal(ranks.assembled(own, atoms), all_atoms)
        before = ranks.sent()
        dealt = ranks.by_columns(own, atoms)
        assert torch.equal(dealt, all_atoms.flatten(1)[:, columns])
        assert ranks.sent() - before == dealt.nbytes * (count - 1) // count
        assert torch.equal(ranks.by_atoms(dealt, own), own)
    sums = ranks.scattered(whole * (number + 1))
    assert torch.equal(sums, whole[ranks.atoms(atoms)] * sum(range(1, count + 1)))
    dist.destroy_process_group()

for count, atoms in ((2, 6), (3, 5), (4, 2)):
    for number in range(count):
        if os.fork() == 0:
            be_rank(number, count, atoms)
            os._exit(0)
    statuses = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(count)]
    assert not any(statuses), (count, statuses)
"""


def test_atoms_and_columns_at_ranks(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
