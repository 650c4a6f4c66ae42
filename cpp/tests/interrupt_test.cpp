// A call ends early where its caller wants that, on all threads, and the pool goes on.
#include "globe/interrupt.hpp"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.hpp"
#include "globe/globe.hpp"

namespace {

using globe::tests::check;

struct Caller {
    bool wants;
    int asked = 0;
    std::thread::id thread = std::this_thread::get_id();
    bool elsewhere = false;
};

bool ask(void* context) {
    auto& caller = *static_cast<Caller*>(context);
    ++caller.asked;
    caller.elsewhere |= caller.thread != std::this_thread::get_id();
    return caller.wants;
}

// Long enough that the next look is a question.
void pause() {
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
}

template <class Call>
void is_interrupted(const std::string& what, const Call& call) {
    for (const bool wants : {true, false}) {
        Caller caller{wants};
        bool ended = false;
        {
            const globe::InterruptScope scope(ask, &caller);
            pause();
            try {
                call();
            } catch (const globe::Interrupted&) {
                ended = true;
            }
        }
        check(ended == wants, what + (wants ? " is interrupted" : " goes on"));
        check(caller.asked > 0 && !caller.elsewhere, what + " asks on the caller's thread");
        call();  // without a scope nothing is asked
    }
}

void interrupts_kernels(int threads) {
    const std::vector<float> ones(64 * 64, 1.0F);
    std::vector<float> out(64 * 64);
    std::vector<double> gram(64 * 64), sums(1);
    const globe::ConstMatrixView rows{ones.data(), 64, 64, globe::DType::float32};
    std::vector<std::int64_t> one_entry(65, 1);
    one_entry[0] = 0;
    const std::int32_t column = 3;
    const globe::CsrView codes{one_entry.data(), &column, ones.data(), 64, 64, 1};
    const std::string on = " on " + std::to_string(threads) + " threads";
    is_interrupted("gram" + on, [&] { globe::gram_add(rows, gram.data(), nullptr, threads); });
    is_interrupted("gram_mirror" + on, [&] { globe::gram_mirror(gram.data(), 64); });
    is_interrupted("compose" + on, [&] {
        globe::compose(codes, rows, {out.data(), 64, 64, globe::DType::float32}, 0.0F, threads);
    });
    is_interrupted("compose_code_gradient" + on,
                   [&] { globe::compose_code_gradient(codes, rows, rows, sums.data(), threads); });
    const globe::RowsView<const float> logits{ones.data(), 64, 64};
    is_interrupted("entmax" + on, [&] { globe::entmax<float>(logits, {out.data(), 64, 64}, {}, threads); });
    is_interrupted("entmax_backward" + on,
                   [&] { globe::entmax_backward<float>(logits, logits, {out.data(), 64, 64}, {}, threads); });
    const std::vector<double> identity{1.0, 0.0, 0.0, 1.0}, correlations(64, 1.0);
    std::vector<double> solved(64);
    is_interrupted("nnls" + on, [&] {
        globe::nnls({identity.data(), correlations.data(), 2, 32}, {},
                    {solved.data(), nullptr, nullptr, nullptr}, threads);
    });
}

// The caller has nothing left to do, and is asked all the same; the others hear of it inside their tasks.
void interrupts_tasks_of_other_threads() {
    Caller caller{true};
    std::atomic<int> ended{0};
    bool thrown = false;
    try {
        const globe::InterruptScope scope(ask, &caller);
        globe::parallel_for(2, 2, [&](std::int64_t task) {
            if (task == 0 && globe::resolve_threads(2) > 1) return;
            try {
                for (;;) globe::check_interrupt();
            } catch (const globe::Interrupted&) {
                ++ended;
                throw;
            }
        });
    } catch (const globe::Interrupted&) {
        thrown = true;
    }
    check(thrown && ended >= 1, "a task of another thread is interrupted");
    std::atomic<int> sum{0};
    globe::parallel_for(100, 2, [&](std::int64_t) { ++sum; });
    check(sum == 100, "the pool works on");
}

void nests() {
    Caller outer{true}, inner{false};
    const globe::InterruptScope first(ask, &outer);
    pause();
    {
        const globe::InterruptScope second(ask, &inner);
        pause();
        globe::check_interrupt();
    }
    check(outer.asked == 0 && inner.asked == 1, "the innermost scope is asked");
    bool thrown = false;
    try {
        globe::check_interrupt();
    } catch (const globe::Interrupted&) {
        thrown = true;
    }
    check(thrown, "then the outer one");
}

}  // namespace

int main() {
    globe::check_interrupt();  // nobody to ask
    for (const int threads : {1, 2}) interrupts_kernels(threads);
    interrupts_tasks_of_other_threads();
    nests();
    return globe::tests::result();
}
