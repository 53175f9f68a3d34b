// Conditional neuron trees, forward and backward. Compiled once for each instruction set (FASTFFN_ISA names it).
//
// Forward. Tokens go down together, a tile at a time, so that while one waits for its next row the processor is busy
// with another's. (Rows are long enough for the machine's own prefetching; asking for them ahead made it slower.) A
// tree too large for the second-level cache is walked in stages of a few levels; between stages tokens are sorted by the
// node they stand at, so that neighbours share rows. Every score is one dot product in a fixed order and every output a
// sum in the order of trees and levels: the result of a token depends neither on its batch nor on the number of threads.
#include "neuron_tree.hpp"

#include <type_traits>

#include "activations.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

using fastffn::scratch;
using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr i64 kTile = 8;    // tokens that go down together
constexpr i64 kChunk = 64;  // tokens whose rows of x stay in the second-level cache
constexpr i64 kStageBytes = 256 << 10;  // of w_in that a stage's subtree may take up

// <x, w>, in the order that every kernel here keeps: four partial sums of every fourth vector.
template <class X, class R>
FASTFFN_INLINE float dot(const X* x, const R* w, i64 n) {
    vf a0{}, a1{}, a2{}, a3{};
    i64 i = 0;
    const auto two = [&](vf& low, vf& high) {
        vf xa, xb, wa, wb;
        if constexpr (sizeof(R) == sizeof(X)) {
            load_pair(x + i, xa, xb);
        } else {  // in the order of int8
            xa = load(x + i);
            xb = load(x + i + W);
        }
        load_pair(w + i, wa, wb);
        low += xa * wa;
        high += xb * wb;
        i += 2 * W;
    };
    while (i + 4 * W <= n) {
        two(a0, a1);
        two(a2, a3);
    }
    if (i + 2 * W <= n) two(a0, a1);
    for (; i + W <= n; i += W) a0 += load(x + i) * load(w + i);
    if (i < n) a1 += load_part(x + i, n - i) * load_part(w + i, n - i);
    return sum((a0 + a1) + (a2 + a3));
}

#if defined(__AVX512BF16__)
// Products of pairs, added in float: half the loads.
FASTFFN_INLINE float dot(const bfloat16* x, const bfloat16* w, i64 n) {
    const auto products = [&](vf sums, i64 i) {
        return (vf)_mm512_dpbf16_ps((__m512)sums, load_raw<__m512bh>(x + i), load_raw<__m512bh>(w + i));
    };
    vf a0{}, a1{}, a2{}, a3{};
    i64 i = 0;
    for (; i + 8 * W <= n; i += 8 * W) {
        a0 = products(a0, i);
        a1 = products(a1, i + 2 * W);
        a2 = products(a2, i + 4 * W);
        a3 = products(a3, i + 6 * W);
    }
    for (; i + 2 * W <= n; i += 2 * W) a0 = products(a0, i);
    for (; i + W <= n; i += W) a1 += load(x + i) * load(w + i);
    if (i < n) a2 += load_part(x + i, n - i) * load_part(w + i, n - i);
    return sum((a0 + a1) + (a2 + a3));
}
#endif

// y (+)= sum over rows of coefficient * row, in the order of the rows. Of unfinished sums (y of floats, rows narrower)
// each pair of vectors is in the order of load_pair.
template <class T, class Y, int B>
FASTFFN_INLINE void combine_block(const T* const* rows, const float* coefficients, i64 count, Y* y, i64 at, bool add) {
    vf a[B][2] = {};
    if constexpr (sizeof(Y) == sizeof(float))
        if (add)
            for (int k = 0; k < B; ++k) {
                a[k][0] = load(y + at + 2 * k * W);
                a[k][1] = load(y + at + (2 * k + 1) * W);
            }
    for (i64 r = 0; r < count; ++r) {
        const vf c = splat(coefficients[r]);
        const T* row = rows[r] + at;
        for (int k = 0; k < B; ++k) {
            vf low, high;
            load_pair(row + 2 * k * W, low, high);
            a[k][0] += c * low;
            a[k][1] += c * high;
        }
    }
    for (int k = 0; k < B; ++k) store_pair<T>(y + at + 2 * k * W, a[k][0], a[k][1]);
}

// `add` only where y is of floats.
template <class T, class Y>
inline void combine(const T* const* rows, const float* coefficients, i64 count, Y* y, i64 n, bool add) {
    i64 at = 0;
    for (; at + 8 * W <= n; at += 8 * W) combine_block<T, Y, 4>(rows, coefficients, count, y, at, add);
    for (; at + 2 * W <= n; at += 2 * W) combine_block<T, Y, 1>(rows, coefficients, count, y, at, add);
    for (i64 here; at < n; at += here) {
        here = n - at < W ? n - at : W;
        vf a = add ? load_some(y + at, here) : vf{};
        for (i64 r = 0; r < count; ++r) a += splat(coefficients[r]) * load_some(rows[r] + at, here);
        store_some(y + at, a, here);
    }
}

// Finishes sums of rows of dtype R.
template <class R, class Y>
inline void narrow_row(const float* from, Y* to, i64 n) {
    i64 at = 0;
    for (; at + 2 * W <= n; at += 2 * W) store_pair<R>(to + at, load(from + at), load(from + at + W));
    for (i64 here; at < n; at += here) {
        here = n - at < W ? n - at : W;
        store_some(to + at, load_some(from + at, here), here);
    }
}

// One tree, whose weights are of dtype R, its biases of dtype B.
template <class R, class B>
struct Tree {
    const R* w_in;
    const B* b_in;
    const R* w_out;
    const float* in_scale;
    const float* out_scale;
    i64 d_in, d_out;

    static constexpr bool scaled = sizeof(R) == 1;

    FASTFFN_INLINE const R* out(i64 node) const { return w_out + node * d_out; }
    template <class X>
    FASTFFN_INLINE float score(const X* x, i64 node) const {
        float score = dot(x, w_in + node * d_in, d_in);
        if constexpr (scaled) score *= in_scale[node];
        return b_in ? score + load_one(b_in + node) : score;
    }
    // What the row of w_out of each node on the path to `node` counts, from the activations.
    FASTFFN_INLINE void scale(float* coefficients, i64 node, i64 levels) const {
        if constexpr (scaled)
            for (i64 level = levels - 1; level >= 0; --level) {
                coefficients[level] *= out_scale[node];
                node = (node - 1) / 2;
            }
    }
};

// A token on its way down one tree.
template <class X, class Tree>
struct Walker {
    const X* x;
    float* scores;  // of all levels
    i32* node;
    const Tree* tree;
};

// Leads `count` walkers from level `from` to before level `to`; after the last level of the tree (`last`) they stay at
// the node they visited, else they stand at the one they visit next.
template <class X, class Tree>
inline void walk(const Walker<X, Tree>* walkers, i64 count, i64 from, i64 to, bool last) {
    for (i64 level = from; level < to; ++level) {
        for (i64 i = 0; i < count; ++i) {
            const Walker<X, Tree>& walker = walkers[i];
            const i64 node = *walker.node;
            const float score = walker.tree->score(walker.x, node);
            walker.scores[level] = score;
            if (last && level + 1 == to) continue;
            // Zero goes left, and so does what is not a number.
            const i64 next = 2 * node + 1 + (score > 0.0f ? 1 : 0);
            *walker.node = static_cast<i32>(next);
        }
    }
}

// The rows of w_out on the path to `node`, the root's first.
template <class Tree, class R>
FASTFFN_INLINE void path_rows(const Tree& tree, i64 node, i64 levels, const R** rows) {
    for (i64 level = levels - 1; level >= 0; --level) {
        rows[level] = tree.out(node);
        node = (node - 1) / 2;
    }
}

// Stable sort of tokens by the node they stand at, all on the level whose first node is `first`.
inline void sort_by_node(const i32* order, const i32* node, i64 count, i64 first, i64 nodes, i32* counts, i32* sorted) {
    std::memset(counts, 0, static_cast<std::size_t>(nodes + 1) * sizeof(i32));
    for (i64 t = 0; t < count; ++t) ++counts[node[t] - first + 1];
    for (i64 n = 0; n < nodes; ++n) counts[n + 1] += counts[n];
    for (i64 i = 0; i < count; ++i) {
        const i32 t = order ? order[i] : static_cast<i32>(i);
        sorted[counts[node[t] - first]++] = t;
    }
}

FASTFFN_INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// Tokens and outputs are of dtype X, weights of dtype R.
template <class X, class R>
struct Forward {
    using Bias = std::conditional_t<sizeof(R) == 1, float, X>;
    using Tree = ::Tree<R, Bias>;
    static constexpr bool wide = sizeof(X) == sizeof(float);

    const fastffn::TreeForward& a;
    const X* x;
    X* y;
    i64 nodes;
    Activation activation;
    int threads;

    explicit Forward(const fastffn::TreeForward& args)
        : a(args),
          x(static_cast<const X*>(args.x)),
          y(static_cast<X*>(args.y)),
          nodes((i64{1} << args.levels) - 1),
          activation(static_cast<Activation>(args.activation)),
          threads(fastffn::usable_threads(args.threads)) {}

    Tree tree(i64 p) const {
        return {static_cast<const R*>(a.w_in) + p * nodes * a.d_in,
                a.b_in ? static_cast<const Bias*>(a.b_in) + p * nodes : nullptr,
                static_cast<const R*>(a.w_out) + p * nodes * a.d_out,
                Tree::scaled ? a.in_scale + p * nodes : nullptr,
                Tree::scaled ? a.out_scale + p * nodes : nullptr,
                a.d_in,
                a.d_out};
    }

    // Few tokens: each tile goes down all trees at once, and its outputs follow immediately.
    void direct() const {
        constexpr i64 kLanes = 16;
        const i64 levels = a.levels, trees = a.trees;
        const i64 tile = trees >= kTile ? 1 : kTile / trees;
        const i64 share = (a.tokens + threads - 1) / threads;
        const i64 step = share < tile ? share : tile;
        const i64 tiles = (a.tokens + step - 1) / step;
        // A thread costs about a microsecond to wake.
        const int used = a.tokens * trees < 4 ? 1 : static_cast<int>(smaller(threads, tiles));
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
        for (i64 number = 0; number < tiles; ++number) {
            const i64 begin = number * step, count = smaller(step, a.tokens - begin);
            float scores[kLanes * 32], coefficients[kLanes * 32];
            const R* rows[kLanes * 32];
            i32 node[kLanes];
            Tree tree_of[kLanes];
            Walker<X, Tree> walkers[kLanes];
            const i64 group = smaller(trees, kLanes / count);
            float* sums = nullptr;
            if (!wide && group < trees)
                sums = static_cast<float*>(scratch(0, static_cast<std::size_t>(count * a.d_out) * sizeof(float)));
            for (i64 p0 = 0; p0 < trees; p0 += group) {
                const i64 here = smaller(group, trees - p0);
                // Lanes by token, then tree: what one token adds up lies together.
                for (i64 p = 0; p < here; ++p) tree_of[p] = tree(p0 + p);
                for (i64 i = 0; i < count; ++i)
                    for (i64 p = 0; p < here; ++p) {
                        const i64 lane = i * here + p;
                        node[lane] = 0;
                        walkers[lane] = {x + (begin + i) * a.x_stride, scores + lane * levels, node + lane, tree_of + p};
                    }
                const i64 lanes = count * here;
                walk(walkers, lanes, 0, levels, true);
                activate_all(activation, scores, coefficients, lanes * levels);
                for (i64 lane = 0; lane < lanes; ++lane) {
                    path_rows(*walkers[lane].tree, node[lane], levels, rows + lane * levels);
                    walkers[lane].tree->scale(coefficients + lane * levels, node[lane], levels);
                }
                for (i64 i = 0; i < count; ++i) {
                    const i64 first = i * here * levels;
                    if (sums)
                        combine(rows + first, coefficients + first, here * levels, sums + i * a.d_out, a.d_out, p0 > 0);
                    else
                        combine(rows + first, coefficients + first, here * levels, y + (begin + i) * a.d_out, a.d_out, p0 > 0);
                }
                if (a.scores)
                    for (i64 i = 0; i < count; ++i)
                        for (i64 p = 0; p < here; ++p) {
                            const i64 at = (p0 + p) * a.tokens + begin + i;
                            std::memcpy(a.scores + at * levels, scores + (i * here + p) * levels,
                                        static_cast<std::size_t>(levels) * sizeof(float));
                            a.last[at] = node[i * here + p];
                        }
            }
            if (sums)
                for (i64 i = 0; i < count; ++i) narrow_row<R>(sums + i * a.d_out, y + (begin + i) * a.d_out, a.d_out);
        }
    }

    // Many tokens: tree by tree, in stages.
    void staged(i64 stages) const {
        const i64 levels = a.levels, tokens = a.tokens;
        const auto floats = [](i64 n) { return static_cast<std::size_t>(n) * sizeof(float); };
        float* own_scores = a.scores ? nullptr : static_cast<float*>(scratch(1, floats(tokens * levels)));
        i32* node = static_cast<i32*>(scratch(2, floats(tokens)));
        i32* order = static_cast<i32*>(scratch(3, floats(2 * tokens)));
        i32* other = order + tokens;
        const i64 widest = i64{1} << (levels * (stages - 1) / stages);
        i32* counts = static_cast<i32*>(scratch(4, floats(widest + 1)));
        float* sums = !wide && a.trees > 1 ? static_cast<float*>(scratch(5, floats(tokens * a.d_out))) : nullptr;
        const i64 chunks = (tokens + kChunk - 1) / kChunk;
        for (i64 p = 0; p < a.trees; ++p) {
            const Tree here = tree(p);
            float* scores = a.scores ? a.scores + p * tokens * levels : own_scores;
            const bool first_tree = p == 0, last_tree = p + 1 == a.trees;
            std::memset(node, 0, floats(tokens));
            const i32* sorted = nullptr;
            for (i64 stage = 0; stage < stages; ++stage) {
                const i64 from = levels * stage / stages, to = levels * (stage + 1) / stages;
                const bool final = stage + 1 == stages;
                if (stage > 0) {
                    i32* into = sorted == order ? other : order;
                    sort_by_node(sorted, node, tokens, (i64{1} << from) - 1, i64{1} << from, counts, into);
                    sorted = into;
                }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
                for (i64 chunk = 0; chunk < chunks; ++chunk) {
                    const i64 begin = chunk * kChunk, count = smaller(kChunk, tokens - begin);
                    Walker<X, Tree> walkers[kTile];
                    const auto token = [&](i64 i) { return sorted ? static_cast<i64>(sorted[begin + i]) : begin + i; };
                    for (i64 done = 0; done < count; done += kTile) {
                        const i64 now = smaller(kTile, count - done);
                        for (i64 i = 0; i < now; ++i) {
                            const i64 t = token(done + i);
                            walkers[i] = {x + t * a.x_stride, scores + t * levels, node + t, &here};
                        }
                        walk(walkers, now, from, to, final);
                    }
                    if (!final) continue;
                    float coefficients[32];
                    const R* rows[32];
                    for (i64 i = 0; i < count; ++i) {
                        const i64 t = token(i);
                        activate_all(activation, scores + t * levels, coefficients, levels);
                        path_rows(here, node[t], levels, rows);
                        here.scale(coefficients, node[t], levels);
                        if (a.last) a.last[p * tokens + t] = node[t];
                        if constexpr (wide) {
                            combine(rows, coefficients, levels, y + t * a.d_out, a.d_out, !first_tree);
                        } else if (sums) {
                            combine(rows, coefficients, levels, sums + t * a.d_out, a.d_out, !first_tree);
                            if (last_tree) narrow_row<R>(sums + t * a.d_out, y + t * a.d_out, a.d_out);
                        } else {
                            combine(rows, coefficients, levels, y + t * a.d_out, a.d_out, false);
                        }
                    }
                }
            }
        }
    }

    void run() const {
        i64 per_stage = 3;
        while (per_stage < 31 && ((i64{2} << per_stage) - 1) * a.d_in * static_cast<i64>(sizeof(R)) <= kStageBytes) ++per_stage;
        const i64 stages = (a.levels + per_stage - 1) / per_stage;
        if (a.tokens < 128)
            direct();
        else
            staged(stages);
    }
};

template <class X, class R>
void forward(const fastffn::TreeForward& args) {
    fastffn::prefer_large_pages(args.y, static_cast<std::size_t>(args.tokens * args.d_out) * sizeof(X));
    if (args.tokens > 0) Forward<X, R>(args).run();
}

// Four dot products with the same vector, each in an order of its own that does not depend on the others.
template <class T>
FASTFFN_INLINE void four_dots(const T* g, const T* const* rows, i64 n, float* results) {
    vf a[4][2] = {};
    i64 i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        vf low, high;
        load_pair(g + i, low, high);
        for (int r = 0; r < 4; ++r) {
            vf row_low, row_high;
            load_pair(rows[r] + i, row_low, row_high);
            a[r][0] += low * row_low;
            a[r][1] += high * row_high;
        }
    }
    for (; i + W <= n; i += W)
        for (int r = 0; r < 4; ++r) a[r][0] += load(g + i) * load(rows[r] + i);
    if (i < n)
        for (int r = 0; r < 4; ++r) a[r][1] += load_part(g + i, n - i) * load_part(rows[r] + i, n - i);
    for (int r = 0; r < 4; ++r) results[r] = sum(a[r][0] + a[r][1]);
}

#if defined(__AVX512BF16__)
FASTFFN_INLINE void four_dots(const bfloat16* g, const bfloat16* const* rows, i64 n, float* results) {
    for (int r = 0; r < 4; ++r) results[r] = dot(g, rows[r], n);
}
#endif

// R rows, each (+)= sum over tokens of coefficient * vector of the token. The coefficients of a token lie `stride`
// after those of the one before, those of the rows side by side. The sums are unfinished.
template <class T, int R, int B>
FASTFFN_INLINE void gather_block(const T* const* vectors, const float* coefficients, i64 stride, i64 count,
                                 float* const* to, const bool* add, i64 at) {
    vf a[R][2 * B];
    for (int r = 0; r < R; ++r)
        for (int k = 0; k < 2 * B; ++k) a[r][k] = add[r] ? load(to[r] + at + k * W) : vf{};
    for (i64 t = 0; t < count; ++t) {
        const T* vector = vectors[t] + at;
        const float* c = coefficients + t * stride;
        for (int k = 0; k < B; ++k) {
            vf low, high;
            load_pair(vector + 2 * k * W, low, high);
            for (int r = 0; r < R; ++r) {
                a[r][2 * k] += splat(c[r]) * low;
                a[r][2 * k + 1] += splat(c[r]) * high;
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int k = 0; k < 2 * B; ++k) store(to[r] + at + k * W, a[r][k]);
}

template <class T, int R>
inline void gather(const T* const* vectors, const float* coefficients, i64 stride, i64 count, float* const* to,
                   const bool* add, i64 n) {
    constexpr int B = R < 4 ? 4 : 2;
    i64 at = 0;
    for (; at + 2 * B * W <= n; at += 2 * B * W) gather_block<T, R, B>(vectors, coefficients, stride, count, to, add, at);
    for (; at + 2 * W <= n; at += 2 * W) gather_block<T, R, 1>(vectors, coefficients, stride, count, to, add, at);
    for (i64 here; at < n; at += here) {
        here = n - at < W ? n - at : W;
        for (int r = 0; r < R; ++r) {
            vf a = add[r] ? load_some(to[r] + at, here) : vf{};
            for (i64 t = 0; t < count; ++t)
                a += splat(coefficients[t * stride + r]) * load_some(vectors[t] + at, here);
            store_some(to[r] + at, a, here);
        }
    }
}

// Backward. Tokens are sorted by the last node they visited, so that the tokens of every node are neighbours. They are
// taken in blocks, whose x and gradient stay in the second-level cache, and blocks in at most kParts parts, one task
// each. A node whose tokens lie within one block is summed there and written once; one that a boundary cuts is summed
// up over the blocks of a part, and over the parts in the end. Parts depend on the number of tokens only: every sum
// has the same order whatever the number of threads, and no two threads add to one place.
constexpr i64 kBlock = 64;
constexpr i64 kParts = 64;

template <class T>
struct Backward {
    const fastffn::TreeBackward& a;
    const T* x;
    const T* g;
    i64 levels, nodes, leaves;
    Activation activation;
    int threads;

    explicit Backward(const fastffn::TreeBackward& args)
        : a(args),
          x(static_cast<const T*>(args.x)),
          g(static_cast<const T*>(args.gradient)),
          levels(args.levels),
          nodes((i64{1} << args.levels) - 1),
          leaves(i64{1} << (args.levels - 1)),
          activation(static_cast<Activation>(args.activation)),
          threads(fastffn::usable_threads(args.threads)) {}

    // One of the two weights, with what its gradient is made of.
    struct Side {
        T* to;                    // [N, width] of this tree, or null
        const float* coefficients;  // [T, L] in sorted order
        const T* vectors;
        i64 stride, width;
        float* slots;  // [parts, L, 2, width]: what a part leaves of nodes that its left boundary cuts, and others
    };

    struct Work {
        const i32* order;   // sorted position -> token
        const i32* last;    // the last node, by sorted position
        const i64* starts;  // [leaves + 1]: first sorted position of each leaf
        Side sides[2];
        i64 part_tokens, parts;
    };

    i64 node_at(const Work& work, i64 position, i64 level) const {
        return ((static_cast<i64>(work.last[position]) + 1) >> (levels - 1 - level)) - 1;
    }

    struct Part {
        i64 number, begin, end;
        bool open[32], left[32];  // of each level: is the node at hand summed up in a slot; does it begin before
    };

    float* slot(const Side& side, i64 part, i64 level, bool left) const {
        return side.slots + ((part * levels + level) * 2 + (left ? 0 : 1)) * side.width;
    }

    // Sums the tokens [begin, end) of a block, which share the nodes of `count` levels from `level` on.
    template <int R>
    void sum_levels(const Work& work, const Part& part, i64 level, i64 begin, i64 end, const bool* direct,
                    const bool* add, float* spare) const {
        for (const Side& side : work.sides) {
            if (!side.to) continue;
            const T* vectors[kBlock];
            for (i64 i = begin; i < end; ++i) vectors[i - begin] = side.vectors + work.order[i] * side.stride;
            float* to[R];
            for (int r = 0; r < R; ++r) {
                if (!direct[r])
                    to[r] = slot(side, part.number, level + r, part.left[level + r]);
                else if constexpr (sizeof(T) == sizeof(float))
                    to[r] = side.to + node_at(work, begin, level + r) * side.width;
                else
                    to[r] = spare + r * side.width;
            }
            gather<T, R>(vectors, side.coefficients + begin * levels + level, levels, end - begin, to, add, side.width);
            if constexpr (sizeof(T) != sizeof(float))
                for (int r = 0; r < R; ++r)
                    if (direct[r]) narrow_row<T>(to[r], side.to + node_at(work, begin, level + r) * side.width, side.width);
        }
    }

    // All nodes from `level` down that the tokens [begin, end) of the block [first, behind) visit.
    void sum_nodes(const Work& work, Part& part, i64 level, i64 begin, i64 end, i64 first, i64 behind, float* spare) const {
        while (level < levels) {
            i64 shared = 0;
            bool direct[32], add[32], closes[32];
            for (; level + shared < levels; ++shared) {
                const i64 l = level + shared, node = node_at(work, begin, l);
                if (node_at(work, end - 1, l) != node) break;
                const bool before = begin == first && begin > 0 && node_at(work, begin - 1, l) == node;
                const bool after = end == behind && end < a.tokens && node_at(work, end, l) == node;
                direct[shared] = !before && !after;
                add[shared] = before && part.open[l];
                closes[shared] = !after;
                if (!direct[shared] && !part.open[l]) part.left[l] = before;
            }
            if (shared == 0) {
                // Two children: the tokens of the left one come first.
                const i64 node = node_at(work, begin, level);
                i64 low = begin, high = end;
                while (high - low > 1) {
                    const i64 middle = (low + high) / 2;
                    (node_at(work, middle, level) == node ? low : high) = middle;
                }
                sum_nodes(work, part, level, begin, high, first, behind, spare);
                begin = high;
                continue;
            }
            for (i64 r = 0; r < shared;) {
                if (shared - r >= 4) {
                    sum_levels<4>(work, part, level + r, begin, end, direct + r, add + r, spare);
                    r += 4;
                } else if (shared - r >= 2) {
                    sum_levels<2>(work, part, level + r, begin, end, direct + r, add + r, spare);
                    r += 2;
                } else {
                    sum_levels<1>(work, part, level + r, begin, end, direct + r, add + r, spare);
                    r += 1;
                }
            }
            for (i64 r = 0; r < shared; ++r) {
                const i64 l = level + r;
                if (direct[r]) continue;
                part.open[l] = !closes[r];
                if (closes[r] && !part.left[l])
                    for (const Side& side : work.sides)
                        if (side.to)
                            narrow_row<T>(slot(side, part.number, l, false),
                                       side.to + node_at(work, begin, l) * side.width, side.width);
            }
            level += shared;
        }
    }

    void run() const {
        const auto floats = [](i64 n) { return static_cast<std::size_t>(n) * sizeof(float); };
        const i64 tokens = a.tokens;
        constexpr bool wide = sizeof(T) == sizeof(float);
        const i64 blocks = (tokens + kBlock - 1) / kBlock;
        const i64 part_blocks = (blocks + kParts - 1) / kParts;
        i32* order = static_cast<i32*>(scratch(2, floats(2 * tokens)));
        i32* last = order + tokens;
        i64* starts = static_cast<i64*>(scratch(3, static_cast<std::size_t>(leaves + 1) * sizeof(i64)));
        float* acts = static_cast<float*>(scratch(4, floats(2 * tokens * levels)));
        float* d_scores = acts + tokens * levels;
        Work work{order, last, starts, {}, part_blocks * kBlock, 0};
        work.parts = tokens ? (tokens + work.part_tokens - 1) / work.part_tokens : 0;
        float* slots = static_cast<float*>(scratch(5, floats(work.parts * levels * 2 * (a.d_in + a.d_out))));
        float* d_x_sums = !wide && a.trees > 1 && a.d_x ? static_cast<float*>(scratch(6, floats(tokens * a.d_in))) : nullptr;
        const bool want_scores = a.d_x || a.d_w_in || a.d_b_in;
        for (i64 p = 0; p < a.trees; ++p) {
            const T* w_in = static_cast<const T*>(a.w_in) + p * nodes * a.d_in;
            const T* w_out = static_cast<const T*>(a.w_out) + p * nodes * a.d_out;
            T* d_w_in = a.d_w_in ? static_cast<T*>(a.d_w_in) + p * nodes * a.d_in : nullptr;
            T* d_w_out = a.d_w_out ? static_cast<T*>(a.d_w_out) + p * nodes * a.d_out : nullptr;
            T* d_b_in = a.d_b_in ? static_cast<T*>(a.d_b_in) + p * nodes : nullptr;
            work.sides[0] = {d_w_in, d_scores, x, a.x_stride, a.d_in, slots};
            work.sides[1] = {d_w_out, acts, g, a.d_out, a.d_out, slots + work.parts * levels * 2 * a.d_in};
            sort(a.last + p * tokens, order, last, starts);

#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
            for (i64 number = 0; number < work.parts; ++number) {
                Part part{number, number * work.part_tokens, smaller((number + 1) * work.part_tokens, tokens), {}, {}};
                float* spare = wide ? nullptr : static_cast<float*>(scratch(7, floats(4 * (a.d_in > a.d_out ? a.d_in : a.d_out))));
                for (i64 begin = part.begin; begin < part.end; begin += kBlock) {
                    const i64 end = smaller(begin + kBlock, part.end);
                    for (i64 i = begin; i < end; ++i) {
                        const i64 t = order[i];
                        const float* scores = a.scores + (p * tokens + t) * levels;
                        activate_all(activation, scores, acts + i * levels, levels);
                        if (want_scores) score_gradients(scores, acts + i * levels, w_out, last[i], g + t * a.d_out, d_scores + i * levels);
                        if (a.d_x) {
                            const T* rows[32];
                            path(w_in, a.d_in, last[i], rows);
                            T* to = static_cast<T*>(a.d_x) + t * a.d_in;
                            if constexpr (wide) {
                                combine(rows, d_scores + i * levels, levels, to, a.d_in, p > 0);
                            } else if (d_x_sums) {
                                combine(rows, d_scores + i * levels, levels, d_x_sums + t * a.d_in, a.d_in, p > 0);
                                if (p + 1 == a.trees) narrow_row<T>(d_x_sums + t * a.d_in, to, a.d_in);
                            } else {
                                combine(rows, d_scores + i * levels, levels, to, a.d_in, false);
                            }
                        }
                    }
                    if (d_w_in || d_w_out) sum_nodes(work, part, 0, begin, end, begin, end, spare);
                }
            }

            // What is left: nodes that a boundary between parts cuts, nodes that nobody visited, and the biases.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
            for (i64 node = 0; node < nodes; ++node) finish(work, node, d_b_in);
        }
    }

    void path(const T* w, i64 width, i64 node, const T** rows) const {
        for (i64 level = levels - 1; level >= 0; --level) {
            rows[level] = w + node * width;
            node = (node - 1) / 2;
        }
    }

    void score_gradients(const float* scores, const float* acts, const T* w_out, i64 node, const T* gradient, float* to) const {
        const T* rows[32];
        float d_act[32], slopes[32];
        path(w_out, a.d_out, node, rows);
        i64 level = 0;
        for (; level + 4 <= levels; level += 4) four_dots(gradient, rows + level, a.d_out, d_act + level);
        for (; level < levels; ++level) d_act[level] = dot(gradient, rows[level], a.d_out);
        slope_all(activation, scores, slopes, levels);
        for (i64 l = 0; l < levels; ++l) to[l] = d_act[l] * slopes[l];
        if (!a.straight_through) return;
        // As if each decision had weighed sigmoid(s), or 1 - sigmoid(s), on all that was met below it.
        float right[32], below = 0.0f;
        activate_all(Activation::sigmoid, scores, right, levels);
        for (i64 l = levels - 1; l >= 0; --l) {
            const float change = right[l] * (1.0f - right[l]);
            to[l] += (scores[l] > 0.0f ? change : -change) * below;
            below += d_act[l] * acts[l];
        }
    }

    void sort(const std::int64_t* visited, i32* order, i32* last, i64* starts) const {
        const i64 first = leaves - 1;
        std::memset(starts, 0, static_cast<std::size_t>(leaves + 1) * sizeof(i64));
        for (i64 t = 0; t < a.tokens; ++t) ++starts[visited[t] - first];
        i64 sum = 0;
        for (i64 leaf = 0; leaf <= leaves; ++leaf) {
            const i64 here = leaf < leaves ? starts[leaf] : 0;
            starts[leaf] = sum;
            sum += here;
        }
        // Filling moves each start to the start of the next leaf; they are put back below.
        for (i64 t = 0; t < a.tokens; ++t) {
            const i64 at = starts[visited[t] - first]++;
            order[at] = static_cast<i32>(t);
            last[at] = static_cast<i32>(visited[t]);
        }
        for (i64 leaf = leaves; leaf > 0; --leaf) starts[leaf] = starts[leaf - 1];
        starts[0] = 0;
    }

    void finish(const Work& work, i64 node, T* d_b_in) const {
        const i64 level = 63 - __builtin_clzll(static_cast<unsigned long long>(node + 1));
        const i64 shift = levels - 1 - level, index = node - ((i64{1} << level) - 1);
        const i64 begin = work.starts[index << shift], end = work.starts[(index + 1) << shift];
        if (d_b_in) {
            double total = 0.0;
            for (i64 i = begin; i < end; ++i) total += work.sides[0].coefficients[i * levels + level];
            float padded[W] = {static_cast<float>(total)};
            store_part(d_b_in + node, load(padded), 1);
        }
        for (const Side& side : work.sides) {
            if (!side.to) continue;
            T* to = side.to + node * side.width;
            if (begin == end) {
                std::memset(to, 0, static_cast<std::size_t>(side.width) * sizeof(T));
                continue;
            }
            const i64 from = begin / work.part_tokens, until = (end - 1) / work.part_tokens;
            if (from == until) continue;
            float* total = slot(side, from, level, false);
            for (i64 part = from + 1; part <= until; ++part) {
                const float* more = slot(side, part, level, true);
                i64 at = 0;
                for (; at + W <= side.width; at += W) store(total + at, load(total + at) + load(more + at));
                if (at < side.width)
                    store_part(total + at, load_part(total + at, side.width - at) + load_part(more + at, side.width - at),
                               side.width - at);
            }
            narrow_row<T>(total, to, side.width);
        }
    }
};

template <class T>
void backward(const fastffn::TreeBackward& args) {
    const auto prefer = [](void* memory, i64 rows, i64 width) {
        fastffn::prefer_large_pages(memory, static_cast<std::size_t>(rows * width) * sizeof(T));
    };
    const i64 nodes = args.trees * ((i64{1} << args.levels) - 1);
    prefer(args.d_x, args.tokens, args.d_in);
    prefer(args.d_w_in, nodes, args.d_in);
    prefer(args.d_w_out, nodes, args.d_out);
    Backward<T>(args).run();
}

const fastffn::TreeKernels kKernels = {
    {forward<float, float>, forward<bfloat16, bfloat16>, forward<float16, float16>},
    {forward<float, std::int8_t>, forward<bfloat16, std::int8_t>, forward<float16, std::int8_t>},
    {backward<float>, backward<bfloat16>, backward<float16>},
};

}  // namespace

namespace fastffn {

#define FASTFFN_JOIN_(a, b) a##b
#define FASTFFN_JOIN(a, b) FASTFFN_JOIN_(a, b)
const TreeKernels* FASTFFN_JOIN(tree_kernels_, FASTFFN_ISA)() { return &kKernels; }

}  // namespace fastffn
