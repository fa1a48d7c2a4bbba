// Hands the CPU kernels of prompt refinement to torch's dispatcher.
#include <algorithm>

#include "common/parallel.h"
#include "prompt/cpu.h"
#include "prompt/ops.h"

namespace efe::prompt {

Tensor Cpu::sum_rows(const Tensor& rows) {
    const int64_t count = rows.size(0), width = rows.size(1);
    Tensor out = empty({width}, rows.scalar_type(), rows);
    for_arithmetic(rows.scalar_type(), [&](auto zero) {
        using A = decltype(zero);
        add_up(rows.data<A>(), count, width, out.mutable_data<A>());
    });
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(efe, CPU, library) { implement_ops<Cpu>(library); }

}  // namespace efe::prompt
