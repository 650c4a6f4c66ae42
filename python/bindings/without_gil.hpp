// How every kernel is called: without the interpreter's lock, and so that Ctrl-C ends it.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <exception>
#include <thread>

#include "globe/interrupt.hpp"

namespace globe::bindings {

// Once the interpreter is being finalised, taking its lock ends the thread: in glibc by unwinding the stack,
// which C++ code does not survive. Such a thread (a daemon's, for the others have been waited for) sleeps
// until the process is gone, as Python itself lets it from version 3.14 on.
inline void take_gil(PyThreadState* state) noexcept {
    try {
        PyEval_RestoreThread(state);
    } catch (...) {
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

// Whether a handler of a signal has raised; on Python's main thread handlers run here.
inline bool signal_raised(void* state) {
    auto& saved = *static_cast<PyThreadState**>(state);
    take_gil(saved);
    const bool raised = PyErr_CheckSignals() != 0;
    saved = PyEval_SaveThread();
    return raised;
}

template <class Work>
void without_gil(const Work& work) {
    PyThreadState* state = PyEval_SaveThread();
    std::exception_ptr error;
    try {
        const InterruptScope scope(signal_raised, &state);
        work();
    } catch (...) {
        error = std::current_exception();
    }
    take_gil(state);
    if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    if (error) std::rethrow_exception(error);
}

}  // namespace globe::bindings
