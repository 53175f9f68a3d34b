from __future__ import annotations

import json

import torch

from fastffn.measure.machine import describe_machine


def test_says_what_a_reader_needs() -> None:
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["processor"]
