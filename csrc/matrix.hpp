// Products of small and middling matrices of floats, for kernels that bring their own loops: tiles that stay in
// registers, the panels they read, and the sums of many rows at once.
//
// A panel holds `depth` rows of up to kPanel columns, side by side; a tile multiplies a few rows of another matrix with
// it. Every element of a product is one sum in the order of the depth (blocks of kDepth added up in order), whatever
// the tile it falls in: cutting the work in another way gives the same bits.
#pragma once

#include "simd.hpp"

namespace {

// Tiles of kRows x kVectors vectors fill the registers: 24 of 32 here, 12 of 16 there.
constexpr int kRows = W == 16 ? 8 : 6;
constexpr int kVectors = W == 16 ? 3 : 2;
constexpr std::int64_t kPanel = kVectors * W;
// A block of a panel, kDepth x kPanel floats, stays in the first-level cache while rows pass by.
constexpr std::int64_t kDepth = W == 16 ? 192 : 384;

FASTFFN_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
FASTFFN_INLINE std::int64_t vectors_of(std::int64_t n) { return (n + W - 1) / W; }

template <int... L>
struct Lanes {};
template <int N, int... L>
struct LanesUpTo : LanesUpTo<N - 1, N - 1, L...> {};
template <int... L>
struct LanesUpTo<0, L...> {
    using type = Lanes<L...>;
};

// One half of the exchange of S x S blocks between two rows of a matrix that is being transposed.
template <int S, bool High, int... L>
FASTFFN_INLINE vf exchange(vf a, vf b, Lanes<L...>) {
    return __builtin_shufflevector(a, b, ((L & S) ? W + (High ? L : L - S) : (High ? L + S : L))...);
}
template <int S, bool High>
FASTFFN_INLINE vf exchange(vf a, vf b) {
    return exchange<S, High>(a, b, typename LanesUpTo<W>::type{});
}

template <int S = 1>
FASTFFN_INLINE void transpose(vf (&rows)[W]) {
    if constexpr (S < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            if (i & S) continue;
            const vf low = exchange<S, false>(rows[i], rows[i + S]);
            rows[i + S] = exchange<S, true>(rows[i], rows[i + S]);
            rows[i] = low;
        }
        transpose<2 * S>(rows);
    }
}

// The sum of each of W vectors, side by side.
template <int S = 1>
FASTFFN_INLINE vf sums(vf (&rows)[W]) {
    if constexpr (S < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i += 2 * S)
            rows[i] = exchange<S, false>(rows[i], rows[i + S]) + exchange<S, true>(rows[i], rows[i + S]);
        return sums<2 * S>(rows);
    }
    return rows[0];
}

// The panel whose columns are `count` rows of `from`: to[k][i] = from[i][k] for k below `depth`, i below `count`, zero
// from there to the next whole vector. What lies `ahead` elements further is fetched: the next panel to be packed.
template <class T>
inline void pack_transposed(const T* from, std::int64_t stride, std::int64_t count, std::int64_t depth, float* to,
                            std::int64_t ahead) {
    const std::int64_t width = vectors_of(count) * W;
    for (std::int64_t i = 0; i < count; i += W) {
        const std::int64_t here = least(W, count - i);
        for (std::int64_t k = 0; k < depth; k += W) {
            const std::int64_t deep = least(W, depth - k);
            vf rows[W];
            const T* block = from + i * stride + k;
            for (int r = 0; r < here; ++r) __builtin_prefetch(block + r * stride + ahead, 0, 2);
            if (here == W && deep == W) {
#pragma GCC unroll 16
                for (int r = 0; r < W; ++r) rows[r] = load(block + r * stride);
                transpose(rows);
#pragma GCC unroll 16
                for (int r = 0; r < W; ++r) store(to + (k + r) * width + i, rows[r]);
                continue;
            }
            for (int r = 0; r < W; ++r) rows[r] = r < here ? load_some(block + r * stride, deep) : vf{};
            transpose(rows);
            for (int r = 0; r < deep; ++r) store(to + (k + r) * width + i, rows[r]);
        }
    }
}

// The panel that holds `count` columns of rows: row(k) points at the first of them.
template <class Row>
inline void pack_rows(Row row, std::int64_t count, std::int64_t depth, float* to) {
    const std::int64_t vectors = vectors_of(count), last = count - (vectors - 1) * W;
    for (std::int64_t k = 0; k < depth; ++k) {
        const auto* from = row(k);
        for (std::int64_t v = 0; v + 1 < vectors; ++v) store(to + v * W, load(from + v * W));
        store(to + (vectors - 1) * W, load_some(from + (vectors - 1) * W, last));
        to += vectors * W;
    }
}

// What a tile multiplies a panel with: rows wherever they lie, or some columns of a matrix taken as rows.
template <int R>
struct RowsOf {
    const float* rows[R];
    FASTFFN_INLINE RowsOf(const float* const* from, std::int64_t at) {
        for (int r = 0; r < R; ++r) rows[r] = from[r] + at;
    }
    FASTFFN_INLINE vf get(int r, std::int64_t k) const { return splat(rows[r][k]); }
};
template <int R>
struct ColumnsOf {
    const float* from;
    std::int64_t stride;
    FASTFFN_INLINE vf get(int r, std::int64_t k) const { return splat(from[k * stride + r]); }
};

// R rows of a product: to[r] = `before`[r] + left[r] panel + bias, of which `columns` are stored.
template <int R, int V, class Left, class Out>
inline void tile(const Left& left, const float* panel, std::int64_t depth, const float* before, const float* bias,
                 Out* const* to, std::int64_t columns) {
    vf c[R][V] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
        vf b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load(panel + (k * V + v) * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf a = left.get(r, k);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) c[r][v] += a * b[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            vf x = c[r][v];
            if (before) x = load(before + r * kPanel + v * W) + x;
            if (bias) x += load(bias + v * W);
            const std::int64_t n = columns - v * W;
            n >= W ? store(to[r] + v * W, x) : store_some(to[r] + v * W, x, n);
        }
}

// `rows` rows of a product with one block of a panel, in tiles; `at<R>(n)` is what the R rows from row n on multiply.
template <int V, class At, class Out>
inline void tiles(At at, std::int64_t rows, const float* panel, std::int64_t depth, const float* before,
                  const float* bias, Out* const* to, std::int64_t columns) {
    std::int64_t n = 0;
    const auto run = [&]<int R>() {
        tile<R, V>(at.template operator()<R>(n), panel, depth, before ? before + n * kPanel : nullptr, bias, to + n,
                   columns);
        n += R;
    };
    while (rows - n >= kRows) run.template operator()<kRows>();
    if (rows - n >= 4) run.template operator()<4>();
    if (rows - n >= 2) run.template operator()<2>();
    if (rows - n >= 1) run.template operator()<1>();
}

template <class At, class Out>
inline void multiply(At at, std::int64_t rows, const float* panel, std::int64_t width, std::int64_t depth,
                     const float* before, const float* bias, Out* const* to, std::int64_t columns) {
    switch (vectors_of(width)) {
        case 1: return tiles<1>(at, rows, panel, depth, before, bias, to, columns);
        case 2: return tiles<2>(at, rows, panel, depth, before, bias, to, columns);
        default: return tiles<kVectors>(at, rows, panel, depth, before, bias, to, columns);
    }
}

}  // namespace
