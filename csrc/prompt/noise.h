// The noise of one row of the policy: as given, or from the seed.
#pragma once

#include <cstdint>

#include "common/inline.h"
#include "common/philox.h"
#include "prompt/kernels.h"

namespace efe::prompt {

template <class A>
struct Noise {
    Row<A> given;
    uint64_t seed;
    int64_t row;

    EFE_INLINE bool is_given() const { return given.data != nullptr; }

    EFE_INLINE A at(int64_t index) const {
        if (is_given()) return element(given, index);
        const Normals4<A> noise = philox_normal4<A>(seed, row, index / 4);
        const int place = static_cast<int>(index % 4);
        return place == 0 ? noise.n0 : place == 1 ? noise.n1 : place == 2 ? noise.n2 : noise.n3;
    }
};

}  // namespace efe::prompt
