"""What is compared in peers.py: per kernel, our calls, every installed peer's call, and how wrong each result is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import scipy.optimize
import scipy.sparse
import torch

from globe import kernels

OURS = ("native", "numba")
BF16 = ml_dtypes.bfloat16


@dataclass(frozen=True)
class Case:
    """Calls that solve one problem, by name; ours are named by their backend."""

    kernel: str
    name: str
    calls: dict[str, Callable[[], Any]]
    error: Callable[[str, Any], float]
    """Of the result of the call with that name."""
    share: Mapping[str, float] = field(default_factory=dict)
    """Of the problem, for calls that solve a part of it."""


def cases(threads: int, wanted: Sequence[str]) -> Iterator[Case]:
    """Yield every case of the wanted kernels (none named: of all); its data live until the next is asked for."""

    def wants(*kernels: str) -> bool:
        return not wanted or bool(set(kernels) & set(wanted))

    for n, k in ((512, 65_536), (1440, 262_144)):
        if wants("gram-bf16"):
            yield gram_case(n, k, BF16, threads)
        if wants("gram-fp32"):
            yield gram_case(n, k, np.float32, threads)
    for m, count in ((64, 2000), (256, 300)):
        if wants("nnls"):
            yield nnls_case(m, count, threads)
        if wants("nnls-simplex"):
            yield simplex_case(m, count, threads)
    for shape in ((8192, 512), (1440, 360)):
        for kernel, alpha in (("sparsemax", 2.0), ("entmax15", 1.5)):
            if wants(kernel):
                yield from entmax_cases(kernel, shape, alpha, threads)
    for case in ((32, 8, 128, 1 << 20), (1440, 12, 360, 1 << 16)):
        if wants("compose"):
            yield compose_case(*case, threads)
    for bits in (4, 8):
        for tokens in (1, 16, 256):
            if wants("qmatmul"):
                yield qmatmul_case(bits, tokens, threads)
    for tokens in (1, 16, 64):
        if wants("compose_matmul"):
            yield compose_matmul_case(tokens, threads)


def gram_case(n: int, k: int, dtype: Any, threads: int) -> Case:
    single = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
    vectors = single.astype(dtype, copy=False)
    if dtype == BF16:
        single = vectors.astype(np.float32)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: kernels.gram(vectors, backend=name, threads=threads) for name in OURS
    }
    calls["numpy SYRK on fp32"] = lambda: single @ single.T
    if dtype == BF16:
        same = torch.from_numpy(vectors.view(np.uint16)).view(torch.bfloat16)
        calls["torch bf16"] = lambda: (same @ same.T).float().numpy()
        if find_spec("numkong") and threads == 1:
            calls["numkong"] = lambda: np.asarray(import_module("numkong").dots_symmetric(vectors, dtype="bfloat16"))
    else:
        tensor = torch.from_numpy(single)
        calls["torch fp32"] = lambda: (tensor @ tensor.T).numpy()
    rows = np.random.default_rng(1).choice(n, 48, replace=False)
    part = vectors[rows].astype(np.float64)
    exact = part @ part.T
    return Case(
        "gram-bf16" if dtype == BF16 else "gram-fp32",
        f"{n} x {k}",
        calls,
        lambda name, result: relative(_upper(result)[np.ix_(rows, rows)], exact),
    )


def nnls_case(m: int, count: int, threads: int) -> Case:
    """Gaussian atoms and targets: about half of the atoms are in use. Slow peers solve a sample."""
    rng = np.random.default_rng(0)
    atoms, targets = rng.standard_normal((m, 2 * m)), rng.standard_normal((count, 2 * m))
    gram, correlations = atoms @ atoms.T, targets @ atoms.T
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: kernels.nnls(gram, correlations, backend=name, threads=threads).codes for name in OURS
    }
    factor = np.linalg.cholesky(gram).T
    sides = np.linalg.solve(factor.T, correlations.T).T
    samples: dict[str, int] = {}

    def one_by_one(name: str, number: int, solve: Callable[[int], Any]) -> None:
        samples[name] = number
        calls[name] = lambda: np.array([solve(i) for i in range(number)])

    one_by_one("scipy.optimize.nnls", 50, lambda i: scipy.optimize.nnls(factor, sides[i])[0])
    if find_spec("sklearn"):
        linear = import_module("sklearn.linear_model").LinearRegression(positive=True, fit_intercept=False)
        one_by_one("scikit-learn", 20, lambda i: linear.fit(factor, sides[i]).coef_)
    if find_spec("fnnls"):
        fnnls = import_module("fnnls").fnnls
        one_by_one("fnnls", 5, lambda i: fnnls(factor, sides[i])[0])
    if find_spec("daqp"):
        daqp = import_module("daqp")
        high, low = np.full(m, 1e30), np.zeros(m)
        nothing = np.zeros((0, m))
        one_by_one("daqp", 20, lambda i: daqp.solve(gram, -correlations[i], nothing, high, low)[0])
    if find_spec("spams"):
        spams = import_module("spams")
        x, g, c = (np.asfortranarray(a) for a in (targets.T, gram, correlations.T))
        settings = {"Q": g, "q": c, "lambda1": 0.0, "mode": spams.PENALTY, "pos": True, "numThreads": threads}
        calls["spams.lasso"] = lambda: spams.lasso(x, **settings).T.toarray()
    return Case(
        "nnls",
        f"m = {m}, {count} right-hand sides",
        calls,
        lambda name, codes: kkt_residual(gram, correlations[: len(codes)], codes),
        share={name: number / count for name, number in samples.items()},
    )


def simplex_case(m: int, count: int, threads: int) -> Case:
    rng = np.random.default_rng(0)
    atoms, targets = rng.standard_normal((m, 2 * m)), rng.standard_normal((count, 2 * m))
    gram, correlations = atoms @ atoms.T, targets @ atoms.T
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: kernels.nnls(gram, correlations, simplex=True, backend=name, threads=threads).codes
        for name in OURS
    }
    if find_spec("spams"):
        spams = import_module("spams")
        x, z = np.asfortranarray(targets.T), np.asfortranarray(atoms.T)
        calls["spams.decompSimplex"] = lambda: spams.decompSimplex(
            x, z, computeXtX=True, numThreads=threads
        ).T.toarray()
    return Case(
        "nnls-simplex",
        f"m = {m}, {count} right-hand sides",
        calls,
        lambda name, codes: kkt_residual(gram, correlations, codes, simplex=True),
    )


def entmax_cases(kernel: str, shape: tuple[int, int], alpha: float, threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    logits, slope = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    exact = kernels.entmax(logits.astype(np.float64), alpha, backend="reference")
    exact_slope = kernels.entmax_backward(exact, slope.astype(np.float64), alpha, backend="reference")
    tensor = torch.from_numpy(logits)
    leaf, ones = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(slope)

    probabilities, derivative = np.zeros_like(logits), np.zeros_like(logits)

    def forward(name: str) -> Any:
        return kernels.entmax(logits, alpha, out=probabilities, backend=name, threads=threads)

    def both(name: str) -> Any:
        settings = {"out": derivative, "backend": name, "threads": threads}
        return kernels.entmax_backward(forward(name), slope, alpha, **settings)

    calls = {name: lambda name=name: forward(name) for name in OURS}
    calls_both = {name: lambda name=name: both(name) for name in OURS}
    if find_spec("entmax"):
        theirs = getattr(import_module("entmax"), kernel)
        for k in (16, 32, 64, None):
            calls[f"entmax k={k}"] = lambda k=k: theirs(tensor, k=k).numpy()
            calls_both[f"entmax k={k}"] = lambda k=k: torch.autograd.grad(theirs(leaf, k=k), leaf, ones)[0].numpy()
        bisect = import_module("entmax").entmax_bisect
        calls["entmax bisect"] = lambda: bisect(tensor, alpha=alpha).numpy()
        calls_both["entmax bisect"] = lambda: torch.autograd.grad(bisect(leaf, alpha=alpha), leaf, ones)[0].numpy()
    where = f"{shape[0]} x {shape[1]}"
    yield Case(kernel, f"{where} forward", calls, lambda name, p: float(np.abs(p - exact).max()))
    yield Case(kernel, f"{where} forward and backward", calls_both, lambda name, g: relative(g, exact_slope))


def compose_case(rows: int, nonzeros: int, m: int, width: int, threads: int) -> Case:
    rng = np.random.default_rng(0)
    columns = np.concatenate([rng.choice(m, nonzeros, replace=False) for _ in range(rows)])
    weights = rng.random(rows * nonzeros, dtype=np.float32)
    pointers = np.arange(0, rows * nonzeros + 1, nonzeros)
    codes = scipy.sparse.csr_array((weights, columns, pointers), shape=(rows, m))
    single = rng.standard_normal((m, width), dtype=np.float32)
    bank = single.astype(BF16)
    single = bank.astype(np.float32)
    line = np.zeros(rows * width * 2 + 64, np.uint8)
    start = -line.ctypes.data % 64
    out = line[start : start + rows * width * 2].view(BF16).reshape(rows, width)
    dense = torch.from_numpy(codes.toarray()).bfloat16()
    tensor = torch.from_numpy(bank.view(np.uint16)).view(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CSR tensors are in beta
        sparse = torch.sparse_csr_tensor(*map(torch.from_numpy, (pointers, columns, weights)), (rows, m))
    tensor_single = torch.from_numpy(single)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: kernels.compose(codes, bank, out=out, backend=name, threads=threads) for name in OURS
    }
    calls["scipy CSR fp32"] = lambda: codes @ single
    calls["torch dense bf16"] = lambda: (dense @ tensor).float().numpy()
    calls["torch CSR fp32"] = lambda: (sparse @ tensor_single).numpy()
    if find_spec("sparse_dot_mkl") and _find_mkl():
        mkl = import_module("sparse_dot_mkl")
        calls["sparse-dot-mkl fp32"] = lambda: mkl.dot_product_mkl(codes, single)
    # A copy moves each byte twice, so half of the traffic is copied.
    traffic = 2 * width * (len(np.unique(columns)) + rows)
    source, target = np.ones(traffic // 2, np.uint8), np.empty(traffic // 2, np.uint8)
    calls["copy of the least traffic"] = lambda: np.copyto(target, source)
    few = slice(0, 1 << 12)
    exact = codes.astype(np.float64) @ single[:, few].astype(np.float64)
    return Case(
        "compose",
        f"{rows} rows x {nonzeros}, m = {m}, width {width}",
        calls,
        lambda name, result: relative(np.asarray(result)[:, few], exact) if result is not None else 0.0,
    )


def qmatmul_case(bits: int, tokens: int, threads: int) -> Case:
    """Products of bf16 with 1408 x 704 weights in groups of 64; peers that know no groups have one scale a row."""
    rng = np.random.default_rng(0)
    rows, columns, group = 1408, 704, 64
    unsigned = rng.integers(0, 1 << bits, (rows, columns), np.int32)
    words = unsigned.astype(np.uint32).reshape(rows, -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
    packed = np.bitwise_or.reduce(words, axis=2).view(np.int32)
    scales = rng.random((rows, columns // group), dtype=np.float32).astype(BF16)
    x = rng.standard_normal((tokens, columns), dtype=np.float32).astype(BF16)
    out = np.empty((tokens, rows), BF16)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: kernels.qmatmul(x, packed, scales, out=out, backend=name, threads=threads)
        for name in OURS
    }
    weights = (unsigned - (1 << bits - 1)) * np.repeat(scales.astype(np.float64), group, axis=1)
    exact = {name: x.astype(np.float64) @ weights.T for name in ("", *OURS)}
    tensor = torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    if bits == 4:
        inner = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(unsigned), 1)
        pairs = np.stack([scales.T, np.zeros_like(scales.T)], axis=2)
        with_zeros = torch.from_numpy(np.ascontiguousarray(pairs).view(np.uint16)).view(torch.bfloat16)
        int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
        calls["torch int4pack"] = lambda: int4(tensor, inner, group, with_zeros).float().numpy()
    else:
        whole = torch.from_numpy((unsigned - 128).astype(np.int8))
        ones = torch.ones(rows, dtype=torch.bfloat16)
        calls["torch int8pack"] = lambda: torch._weight_int8pack_mm(tensor, whole, ones).float().numpy()
        exact["torch int8pack"] = x.astype(np.float64) @ (unsigned - 128.0).T
    if find_spec("onnxruntime") and find_spec("onnx"):
        single = x.astype(np.float32)
        for level in (0, 4):  # activations as they are, or in 8 bits
            session = _matmul_n_bits(unsigned, scales.astype(np.float32), bits, level, threads)
            name = f"onnxruntime {'fp32' if level == 0 else 'int8'}"
            calls[name] = lambda session=session: session.run(None, {"A": single})[0]
    return Case(
        "qmatmul",
        f"int{bits}, {tokens} x {rows} x {columns}",
        calls,
        lambda name, result: relative(result, exact.get(name, exact[""])),
    )


def _matmul_n_bits(unsigned: np.ndarray, scales: np.ndarray, bits: int, level: int, threads: int) -> Any:
    """A session of onnxruntime with one MatMulNBits."""
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    (rows, columns), groups = unsigned.shape, scales.shape[1]
    entries = unsigned.astype(np.uint8)
    if bits == 4:
        entries = entries[:, 0::2] | entries[:, 1::2] << 4
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    settings = {"K": columns, "N": rows, "bits": bits, "block_size": columns // groups, "accuracy_level": level}
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", **settings)],
        "product",
        [helper.make_tensor_value_info("A", kind, ["n", columns])],
        [helper.make_tensor_value_info("Y", kind, ["n", rows])],
        [
            onnx.numpy_helper.from_array(entries.reshape(rows, groups, -1), "B"),
            onnx.numpy_helper.from_array(scales, "S"),
        ],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compose_matmul_case(tokens: int, threads: int) -> Case:
    """A mixture of 12 atoms of 704 x 2048 in bf16; the dense product is that of the mixture, which is there already."""
    rng = np.random.default_rng(0)
    codes = rng.random((1, 12), dtype=np.float32)
    bank = rng.standard_normal((12, 704, 2048), dtype=np.float32).astype(BF16)
    x = rng.standard_normal((tokens, 2048), dtype=np.float32).astype(BF16)
    out = np.empty((tokens, 704), np.float32)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: kernels.compose_matmul(codes, bank, x, out=out, backend=name, threads=threads)
        for name in OURS
    }
    formed = np.einsum("j,jrd->rd", codes[0].astype(np.float64), bank.astype(np.float64))
    exact = x.astype(np.float64) @ formed.T
    token, mixture = (torch.from_numpy(a.astype(np.float32)).bfloat16() for a in (x, formed))
    calls["torch bf16, formed"] = lambda: (token @ mixture.T).float().numpy()
    single, rows = token.float(), mixture.float()
    calls["torch fp32, formed"] = lambda: (single @ rows.T).numpy()
    formed_each = np.empty((1, 704, 2048), BF16)

    def compose_and_multiply() -> Any:
        made = kernels.compose(codes, bank, out=formed_each, threads=threads)[0]
        return (token @ torch.from_numpy(made.view(np.uint16)).view(torch.bfloat16).T).float().numpy()

    calls["compose, torch bf16"] = compose_and_multiply
    source, target = np.ones(bank.nbytes // 2, np.uint8), np.empty(bank.nbytes // 2, np.uint8)
    calls["copy of the least traffic"] = lambda: np.copyto(target, source)
    return Case(
        "compose_matmul",
        f"{tokens} x 12 atoms of 704 x 2048",
        calls,
        lambda name, result: relative(result, exact) if result is not None else 0.0,
    )


def relative(found: Any, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


def kkt_residual(gram: np.ndarray, correlations: np.ndarray, codes: np.ndarray, simplex: bool = False) -> float:
    """Largest violation of the optimality conditions, relative to the size of the gradient's terms."""
    w = correlations - codes @ gram
    positive = codes > 1e-9 * codes.max(1, keepdims=True)  # some peers leave rounding noise in place of zeros
    if simplex:
        w = w - (w * positive).sum(1, keepdims=True) / np.maximum(positive.sum(1, keepdims=True), 1)
    violation = np.where(positive, np.abs(w), np.maximum(w, 0.0)).max(1)
    scale = np.abs(correlations).max(1) + gram.diagonal().max() * np.abs(codes).sum(1)
    return float((violation / scale).max())


def _upper(matrix: Any) -> np.ndarray:
    """Full matrix from its upper triangle: some peers fill no more."""
    array = np.triu(np.asarray(matrix, np.float64))
    return array + np.triu(array, 1).T


def _find_mkl() -> bool:
    try:
        for file in metadata.files("mkl") or ():
            if file.name.startswith("libmkl_rt.so"):
                os.environ.setdefault("MKL_RT", str(Path(file.locate()).resolve()))
        import_module("sparse_dot_mkl")
    except ImportError:  # or no package of that name
        return False
    return True
