// A decoder's operators on a CPU, over raw pointers and with a plain C interface: nothing here knows torch.
//
// attention.hpp looks at keys and values that pages.hpp has gathered; rows.hpp has what is done to each row by itself; linear
// operators go through matrix_tiles.hpp where there are any, and through panels.hpp elsewhere; layer.hpp strings them all
// together for few rows; linear.hpp, tiles.hpp and vectors.hpp are what these stand on.
//
// One source for every machine. It is written in vectors of W floats that the compiler maps to what there is, and is
// built once for each kind of processor; stages/native.py takes the best that this one can run.
//
// What each row gets depends on that row alone: every sum runs in an order that is fixed by the row's own position. So
// a row has the same bits in whatever batch, block or chunk it is computed, and on however many threads.
//
// Letters: N rows, H query heads, K key-value heads, G = H / K, D head size, S slots of a page, T positions.

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "layer.hpp"

namespace {

// How bfloat16 is multiplied here, and the integers that are made of it.
template <class E>
#if defined(__AMX_BF16__)
using InBest = InTiles<E>;
#else
using InBest = InVectors<E>;
#endif

}  // namespace

// dtype: 0 float32, 1 bfloat16. All strides and offsets are counted in elements.
extern "C" {

int headway_interface() { return 6; }  // grows with every change of the functions below

// Whether the system lets this process run it: tile registers are asked for once.
int headway_ready() {
#if defined(__AMX_BF16__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 1;
#endif
}

int headway_lanes() { return W; }

void headway_attend(int dtype, const void* q, void* y, const void* pool, const int64_t* tables, const int64_t* geometry,
                    const int64_t* glances, int64_t num_glances, int num_threads) {
    const Geometry& g = *reinterpret_cast<const Geometry*>(geometry);
    const Glance* each = reinterpret_cast<const Glance*>(glances);
    if (dtype == 0) {
        attend(static_cast<const float*>(q), static_cast<float*>(y), static_cast<const float*>(pool), tables, g, each,
               num_glances, num_threads);
    } else {
        attend(static_cast<const bf16*>(q), static_cast<bf16*>(y), static_cast<const bf16*>(pool), tables, g, each,
               num_glances, num_threads);
    }
}

// `q_norm`, `k_norm`: of heads, where the model has them.
void headway_place(int dtype, void* qkv, int64_t num_rows, const int64_t* positions, const float* rope,
                   const int64_t* pages, const int64_t* slots, void* pool, const int64_t* heads, const void* q_norm,
                   const void* k_norm, float eps, float scale, int num_threads) {
    const Heads& h = *reinterpret_cast<const Heads*>(heads);
    const auto with = [&](auto* typed) {
        typedef std::remove_pointer_t<decltype(typed)> T;
        place(typed, num_rows, positions, rope, pages, slots, static_cast<T*>(pool), h,
              {static_cast<const T*>(q_norm), static_cast<const T*>(k_norm), eps}, scale, num_threads);
    };
    if (dtype == 0) {
        with(static_cast<float*>(qkv));
    } else {
        with(static_cast<bf16*>(qkv));
    }
}

void headway_norm(int dtype, const void* x, int64_t x_stride, const void* weight, void* y, int64_t num_rows,
                  int64_t size, float eps, int num_threads) {
    if (dtype == 0) {
        norm(static_cast<const float*>(x), x_stride, static_cast<const float*>(weight), static_cast<float*>(y),
             num_rows, size, eps, num_threads);
    } else {
        norm(static_cast<const bf16*>(x), x_stride, static_cast<const bf16*>(weight), static_cast<bf16*>(y), num_rows,
             size, eps, num_threads);
    }
}

void headway_activate(int dtype, const void* wide, void* y, int64_t num_rows, int64_t size, int num_threads) {
    if (dtype == 0) {
        activate(static_cast<const float*>(wide), static_cast<float*>(y), num_rows, size, num_threads);
    } else {
        activate(static_cast<const bf16*>(wide), static_cast<bf16*>(y), num_rows, size, num_threads);
    }
}

// Columns of a panel of weights.
int headway_panel() { return PANEL; }

// How many bytes the panels of such a matrix take, of its dtype or of integers of eight bits.
int64_t headway_panels_bytes(int dtype, int64_t d_out, int64_t d_in, int integers) {
    const int64_t size = integers ? 1 : dtype == 0 ? 4 : 2;
#if defined(__AMX_BF16__)
    const int64_t deep = dtype == 0 ? 1 : LINE / size;
#else
    const int64_t deep = integers ? InVectors<int8_t>::DEEP : dtype == 0 ? 1 : InVectors<bf16>::DEEP;
#endif
    return tiles(d_out, PANEL) * PANEL * tiles(d_in, deep) * deep * size;
}

// Whether what is multiplied so may end as a gate: half of the columns whole panels of it, and not in matrix tiles.
int headway_gates(int dtype, int64_t d_out) {
#if defined(__AMX_BF16__)
    if (dtype != 0) return 0;
#endif
    return d_out % (2 * PANEL) == 0;
}

// With `scales`, one for each column, they are integers, made of bfloat16. `gates`: to end as a gate, columns of the first
// half for those of the second.
void headway_pack(int dtype, const void* weight, int64_t d_out, int64_t d_in, int gates, void* panels, float* scales) {
    const auto with = [&](auto in, const auto* typed, auto* to) {
        pack<decltype(in)>(typed, d_out, d_in, gates != 0, to, scales);
    };
    if (dtype == 0) {
        with(InVectors<float>(), static_cast<const float*>(weight), static_cast<float*>(panels));
    } else if (scales) {
        with(InBest<int8_t>(), static_cast<const bf16*>(weight), static_cast<int8_t*>(panels));
    } else {
        with(InBest<bf16>(), static_cast<const bf16*>(weight), static_cast<bf16*>(panels));
    }
}

// `ending`: an Ending.
void headway_linear(int dtype, const void* x, int64_t x_stride, int64_t num_rows, const void* panels,
                    const float* scales, int64_t d_in, int64_t first, int64_t d_out, const void* bias, void* y,
                    int64_t y_stride, int ending, int num_threads) {
    const auto with = [&](auto* typed, const auto* weights) {
        typedef std::remove_pointer_t<decltype(typed)> T;
        linear(static_cast<const T*>(x), x_stride, num_rows, weights, scales, d_in, first, d_out,
               static_cast<const T*>(bias), typed, y_stride, static_cast<Ending>(ending), num_threads);
    };
    if (dtype == 0) {
        with(static_cast<float*>(y), static_cast<const float*>(panels));
    } else if (scales) {
        with(static_cast<bf16*>(y), static_cast<const int8_t*>(panels));
    } else {
        with(static_cast<bf16*>(y), static_cast<const bf16*>(panels));
    }
}

// One layer of a decoder over rows x, in place; `parts`, `course` and `heads` are a Parts, a Course and a Heads.
void headway_layer(int dtype, void* x, int64_t num_rows, const int64_t* parts, const int64_t* course,
                   const int64_t* heads, float scale, float eps, int num_threads) {
    const Parts& p = *reinterpret_cast<const Parts*>(parts);
    const Course& c = *reinterpret_cast<const Course*>(course);
    const Heads& h = *reinterpret_cast<const Heads*>(heads);
    if (dtype == 0) {
        layer<float>(static_cast<float*>(x), num_rows, p, c, h, scale, eps, num_threads);
    } else if (p.qkv.scales) {
        layer<int8_t>(static_cast<bf16*>(x), num_rows, p, c, h, scale, eps, num_threads);
    } else {
        layer<bf16>(static_cast<bf16*>(x), num_rows, p, c, h, scale, eps, num_threads);
    }
}
}
