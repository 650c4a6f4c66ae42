"""Ctrl-C ends a long call soon, and the process goes on; threads that outlive the interpreter end with it."""

import signal
import subprocess
import sys
import time

import pytest

# Every call would take minutes: the parent's patience is the test. It sends SIGINT once it reads a name.
LONG = """
import signal, sys
import numpy as np, scipy.sparse
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from globe.kernels import *
backend = sys.argv[1]
n, each, width = 4000, 10_000, 1 << 15
repeated = scipy.sparse.csr_array(
    (np.ones(n * each, np.float32), np.zeros(n * each, np.int32), np.arange(0, n * each + 1, each)), shape=(n, 1)
)
bank, out = np.ones((1, width), np.float32), np.zeros((n, width), np.float32)
rng = np.random.default_rng(0)
atoms = rng.standard_normal((800, 900))
products, targets = atoms @ atoms.T, rng.standard_normal((50_000, 900)) @ atoms.T
gradient = np.broadcast_to(bank[:, : 1 << 13], (n, 1 << 13)).copy()
calls = {
    "compose": lambda threads: compose(repeated, bank, out=out, backend=backend, threads=threads),
    "code gradient": lambda threads: compose_code_gradient(
        repeated, gradient, bank[:, : 1 << 13], backend=backend, threads=threads
    ),
    "nnls": lambda threads: nnls(products, targets, backend=backend, threads=threads),
}
small = rng.standard_normal((40, 50)).astype(np.float32)
expected = gram(small, backend=backend), entmax(small, backend=backend), nnls(products, targets[:2], backend=backend)
compose(repeated[:1], bank, backend=backend), compose_code_gradient(repeated[:1], bank, bank, backend=backend)
for name, call in calls.items():
    for threads in (1, 2):
        try:
            print(name, flush=True)
            call(threads)
            sys.exit(f"{name} came to its end")
        except KeyboardInterrupt:
            pass
        assert np.array_equal(gram(small, backend=backend), expected[0])
        assert np.array_equal(entmax(small, backend=backend), expected[1])
        assert np.array_equal(nnls(products, targets[:2], backend=backend).codes, expected[2].codes)
"""


def run_interrupted(code, *arguments):
    """Run Python code, sending SIGINT a moment after each line that it prints; return the lines."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            time.sleep(0.3)  # the call is under way
            process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        return lines
    finally:
        process.kill()


@pytest.mark.timeout(100)
@pytest.mark.parametrize("backend", ["native", "numba"])
def test_sigint_ends_long_calls(backend):
    assert run_interrupted(LONG, backend) == ["compose"] * 2 + ["code gradient"] * 2 + ["nnls"] * 2


# Non-daemon threads are waited for; a daemon's call goes on until the process is gone.
DAEMON = """
import sys, threading, time
import numpy as np
from globe.kernels import entmax, gram
x = np.random.default_rng(0).standard_normal((300, 4000)).astype(np.float32)
kernel, backend, pause = sys.argv[1:]
calls = {
    "gram": lambda: gram(x, threads=2, backend=backend),
    "entmax": lambda: entmax(x, 1.3, threads=2, backend=backend),
}
call = calls[kernel]
began = threading.Barrier(4)

def forever():
    call()
    began.wait()
    while True:
        call()

for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
began.wait()
time.sleep(float(pause))
"""


@pytest.mark.parametrize(
    ("kernel", "backend", "pauses"),
    [("gram", "native", "0 0.005 0.02"), ("entmax", "native", "0 0.005 0.02"), ("entmax", "numba", "0.01")],
)
def test_a_daemon_thread_does_not_abort_the_process(kernel, backend, pauses):
    for pause in pauses.split():
        done = subprocess.run([sys.executable, "-c", DAEMON, kernel, backend, pause], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert backend == "numba" or done.stderr == ""  # Python refuses new threads to Numba's loop
