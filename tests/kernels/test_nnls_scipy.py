"""SciPy's own tests of `optimize.nnls`, from the installed SciPy, run on `kernels.nnls` with `refine`.

Two of the 14 cannot be expressed: `test_atol_deprecation_warning` is about a parameter that SciPy itself has given up,
`test_2D_not_singleton_RHS_input_2` about the words of SciPy's error for a target of two dimensions.
"""

import numpy as np
import pytest
import scipy.optimize.tests.test_nnls as theirs

from globe.kernels import NnlsStatus, nnls

NOT_EXPRESSIBLE = {"test_atol_deprecation_warning", "test_2D_not_singleton_RHS_input_2"}
ALL = {name for name in dir(theirs.TestNNLS) if name.startswith("test_")}


def test_what_cannot_be_expressed_is_there():
    assert NOT_EXPRESSIBLE <= ALL


@pytest.mark.parametrize("name", sorted(ALL - NOT_EXPRESSIBLE))
def test_scipy(backend, name, monkeypatch):
    def solve(matrix, target, maxiter=None):
        matrix, target = np.asarray(matrix, float), np.ravel(target).astype(float)
        settings = {"max_iterations": maxiter, "refine": (matrix, target), "backend": backend}
        result = nnls(matrix.T @ matrix, (target @ matrix)[None], **settings)
        if result.status[0] == NnlsStatus.NOT_CONVERGED:
            raise RuntimeError("not converged")
        return result.codes[0], np.linalg.norm(matrix @ result.codes[0] - target)

    monkeypatch.setattr(theirs, "nnls", solve)
    suite = theirs.TestNNLS()
    suite.setup_method()
    getattr(suite, name)()
