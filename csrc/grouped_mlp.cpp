// Grouped MLPs, forward and backward. Compiled once for each instruction set (FASTFFN_ISA names it).
//
// Tokens are sorted by MLP and taken in blocks, all of one MLP. A block of a few tokens reads each row of weights once,
// and multiplies it with all its tokens; its time is that of the weights' way from memory. A larger one turns panels
// of weights into the layout of matrix.hpp, block by block, while they are in the cache: rows of x and y are used where
// they lie. Every element of every result is one sum in a fixed order; tasks only divide the elements among threads.
#include "grouped_mlp.hpp"

#include "activations.hpp"
#include "matrix.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace {

using fastffn::scratch;
using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr i64 kBlock = 256;  // tokens that share a panel of weights once it has been packed
constexpr i64 kFew = 32;     // so many, or fewer, and packing would cost more than it saves
constexpr i64 kVeryFew = 6;  // the same for short rows, where summing up a vector at the end costs most of it
constexpr i64 kShort = 128;
constexpr i64 kStreams = 4;  // rows of weights read at once for few tokens
constexpr i64 kAhead = 4096; // bytes between what is read and what is fetched

inline bool by_rows(i64 count, i64 depth) { return count <= (depth < kShort ? kVeryFew : kFew); }

// What uses each block of scratch memory: the first of the calling thread, the others of every thread.
enum Slot { kPlan, kHidden, kGate, kPanelSlot, kSumsSlot, kFloats, kToSums, kTo };

inline std::size_t floats(i64 n) { return static_cast<std::size_t>(n) * sizeof(float); }

template <class T>
T* scratch_of(int slot, i64 n) {
    return static_cast<T*>(scratch(slot, static_cast<std::size_t>(n) * sizeof(T)));
}

template <class T>
inline void copy_row(const float* from, T* to, i64 n) {
    i64 at = 0;
    for (; at + W <= n; at += W) store(to + at, load(from + at));
    if (at < n) store_some(to + at, load_some(from + at, n - at), n - at);
}

template <class T>
inline void widen_row(const T* from, float* to, i64 n) {
    i64 at = 0;
    for (; at + W <= n; at += W) store(to + at, load(from + at));
    if (at < n) store(to + at, load_some(from + at, n - at));
}

// Rows of floats between matrices start at different lines of the cache, also where widths are powers of two.
inline i64 padded(i64 n) { return vectors_of(n) * W + 16; }

struct Block {
    i64 mlp, begin, count;
};

// Where the tokens of each MLP are, in sorted order, and their blocks.
struct Plan {
    const i64* order;
    i64* starts;  // [E + 1]
    Block* blocks;
    i64 count;
};

inline i64 most_blocks(i64 tokens, i64 mlps) { return least(tokens, mlps + tokens / kBlock); }

inline void cut(Plan& plan, i64 mlps) {
    plan.count = 0;
    for (i64 e = 0; e < mlps; ++e) {
        const i64 begin = plan.starts[e], size = plan.starts[e + 1] - begin;
        if (size == 0) continue;
        const i64 parts = (size + kBlock - 1) / kBlock;
        const i64 step = least(kBlock, ((size + parts - 1) / parts + kRows - 1) / kRows * kRows);
        for (i64 at = 0; at < size; at += step) plan.blocks[plan.count++] = {e, begin + at, least(step, size - at)};
    }
}

// `rows` rows of `left` times a matrix of `depth` rows, of which `pack(k, deep, to)` packs some into a panel. Sums that
// another product has begun lie in scratch memory, and are left there where another one goes on.
template <class Pack, class Left, class Out>
inline void product(Pack pack, Left left, i64 rows, i64 depth, i64 columns, const float* bias, Out* const* to,
                    bool begun = false, bool goes_on = false) {
    float* panel = scratch_of<float>(kPanelSlot, kDepth * kPanel);
    float* sums = nullptr;
    float** to_sums = nullptr;
    if (depth > kDepth || begun || goes_on) {
        sums = scratch_of<float>(kSumsSlot, rows * kPanel);
        to_sums = scratch_of<float*>(kToSums, rows);
        for (i64 r = 0; r < rows; ++r) to_sums[r] = sums + r * kPanel;
    }
    for (i64 k = 0; k < depth; k += kDepth) {
        const i64 deep = least(kDepth, depth - k);
        pack(k, deep, panel);
        const float* before = k > 0 || begun ? sums : nullptr;
        if (k + deep == depth && !goes_on)
            multiply(left(k), rows, panel, columns, deep, before, bias, to, columns);
        else
            multiply(left(k), rows, panel, columns, deep, before, nullptr, to_sums, vectors_of(columns) * W);
    }
}

inline auto rows_of(const float* const* rows) {
    return [rows](i64 k) { return [rows, k]<int R>(i64 n) { return RowsOf<R>(rows + n, k); }; };
}
inline auto columns_of(const float* from, i64 stride) {
    return [from, stride](i64 k) {
        return [from, stride, k]<int R>(i64 n) { return ColumnsOf<R>{from + k * stride + n, stride}; };
    };
}

// <row of weights, vector> for R rows and N vectors, as sums of a vector each.
template <int R, int N, class T, class V>
FASTFFN_INLINE void dots(const T* rows, i64 stride, i64 depth, const V* const* vectors, vf (*parts)[W], i64 ahead) {
    vf a[R][N] = {};
    i64 k = 0;
    for (; k + W <= depth; k += W) {
        vf v[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) v[n] = load(vectors[n] + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const T* row = rows + r * stride + k;
            __builtin_prefetch(row + ahead, 0, 3);
            const vf w = load(row);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) a[r][n] += w * v[n];
        }
    }
    if (k < depth)
        for (int n = 0; n < N; ++n) {
            const vf v = load_some(vectors[n] + k, depth - k);
            for (int r = 0; r < R; ++r) a[r][n] += load_some(rows + r * stride + k, depth - k) * v;
        }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) parts[n][r] = a[r][n];
}

template <int R, class T, class V>
inline void dots_of(const T* rows, i64 stride, i64 depth, const V* const* vectors, i64 count, vf (*parts)[W], i64 at,
                    i64 ahead) {
    const auto run = [&]<int N>(i64 from) {
        vf some[N][W];
        dots<R, N>(rows, stride, depth, vectors + from, some, ahead);
        for (int n = 0; n < N; ++n)
            for (int r = 0; r < R; ++r) parts[from + n][at + r] = some[n][r];
    };
    i64 n = 0;
    for (; n + 4 <= count; n += 4) run.template operator()<4>(n);
    if (count - n == 3) return run.template operator()<3>(n);
    if (count - n == 2) return run.template operator()<2>(n);
    if (count - n == 1) return run.template operator()<1>(n);
}

// `rows` rows of weights times a few vectors: give(n, row, W results, how many of them).
template <class T, class B, class V, class Give>
inline void few(const T* weights, i64 rows, i64 depth, const B* scale, const B* bias, const V* const* vectors,
                i64 count, Give give) {
    vf parts[kFew][W];
    const i64 unit = static_cast<i64>(sizeof(T));
    const i64 ahead = (kStreams * depth * unit > kAhead ? kStreams * depth * unit : kAhead) / unit;
    for (i64 row = 0; row < rows; row += W) {
        const i64 here = least(W, rows - row);
        const T* from = weights + row * depth;
        i64 r = 0;
        for (; r + kStreams <= here; r += kStreams)
            dots_of<kStreams>(from + r * depth, depth, depth, vectors, count, parts, r, ahead);
        for (; r < here; ++r) dots_of<1>(from + r * depth, depth, depth, vectors, count, parts, r, ahead);
        for (i64 n = 0; n < count; ++n) {
            for (r = here; r < W; ++r) parts[n][r] = vf{};
            vf result = sums(parts[n]);
            if (scale) result *= load_some(scale + row, here);
            if (bias) result += load_some(bias + row, here);
            give(n, row, result, here);
        }
    }
}

// Threads for some weights, each read once and multiplied with `tokens`: none where waking them takes longer.
inline int threads_for(i64 blocks, i64 tokens, i64 weights, int threads) {
    return (4 * blocks + tokens) * weights < (i64{1} << 17) ? 1 : threads;
}

// One of the linear maps of all MLPs: weights of dtype S, which have scales if that is int8.
template <class T, class S>
struct Map {
    const S* weight;
    const T *bias, *scale;

    Map(const void* weights, const void* biases, const void* scales)
        : weight(static_cast<const S*>(weights)),
          bias(static_cast<const T*>(biases)),
          scale(static_cast<const T*>(scales)) {}

    // The rows from number `row` on, counted over all MLPs.
    Map from(i64 row, i64 depth) const {
        return {weight + row * depth, bias ? bias + row : nullptr, scale ? scale + row : nullptr};
    }
};

// Tokens, biases and outputs are of dtype T, weights of dtype S.
template <class T, class S>
struct Forward {
    const fastffn::MlpForward& a;
    const T* x;
    Map<T, S> up_map, down_map, gate_map;
    T* y;
    i64 stride;  // of the rows of hidden activations
    Activation activation;
    Plan plan{};

    explicit Forward(const fastffn::MlpForward& args)
        : a(args),
          x(static_cast<const T*>(args.x)),
          up_map(args.up_weight, args.up_bias, args.up_scale),
          down_map(args.down_weight, args.down_bias, args.down_scale),
          gate_map(args.gate_weight, args.gate_bias, args.gate_scale),
          y(static_cast<T*>(args.y)),
          stride(padded(args.hidden)),
          activation(static_cast<Activation>(args.activation)) {}

    void sort() {
        const i64 most = most_blocks(a.tokens, a.mlps);
        const i64 own_order = a.order ? 0 : a.tokens;
        plan.starts = scratch_of<i64>(kPlan, a.mlps + 2 + own_order + 3 * most);
        i64* order = a.order ? a.order : plan.starts + a.mlps + 2;
        plan.order = order;
        plan.blocks = reinterpret_cast<Block*>(plan.starts + a.mlps + 2 + own_order);
        const auto mlp = [&](i64 t) {
            const i64 e = a.index[t];
            return e >= 0 && e < a.mlps ? e : a.mlps;
        };
        i64* next = plan.starts + 1;
        std::memset(plan.starts, 0, static_cast<std::size_t>(a.mlps + 2) * sizeof(i64));
        for (i64 t = 0; t < a.tokens; ++t) ++next[mlp(t)];
        i64 sum = 0;
        for (i64 e = 0; e <= a.mlps; ++e) {
            const i64 here = next[e];
            next[e] = sum;
            sum += here;
        }
        // Filling moves each start to where the MLP's tokens end, which is where the next one's start.
        for (i64 t = 0; t < a.tokens; ++t) order[next[mlp(t)]++] = t;
        if (a.ends)
            for (i64 e = 0; e < a.mlps; ++e) a.ends[e] = static_cast<i32>(next[e]);
        cut(plan, a.mlps);
    }

    // The rows of x of a block, as floats.
    void inputs(const Block& block, const float** rows) const {
        if constexpr (sizeof(T) == sizeof(float)) {
            for (i64 i = 0; i < block.count; ++i) rows[i] = x + plan.order[block.begin + i] * a.x_stride;
        } else {
            float* copy = scratch_of<float>(kFloats, block.count * padded(a.d_in));
            for (i64 i = 0; i < block.count; ++i) {
                float* to = copy + i * padded(a.d_in);
                widen_row(x + plan.order[block.begin + i] * a.x_stride, to, a.d_in);
                rows[i] = to;
            }
        }
    }

    // What is saved, and the activation, of hidden neurons from `column` on.
    void activate_columns(const Block& block, i64 column, i64 width, float* hidden, float* gate) const {
        const i64 whole = vectors_of(width) * W;
        for (i64 i = 0; i < block.count; ++i) {
            float* up = hidden + i * stride + column;
            const i64 at = (block.begin + i) * a.hidden + column;
            if (a.up) copy_row(up, static_cast<T*>(a.up) + at, width);
            if (!gate) {
                activate_all(activation, up, up, whole);
                continue;
            }
            float* own = gate + i * stride + column;
            if (a.gate) copy_row(own, static_cast<T*>(a.gate) + at, width);
            activate_all(activation, own, own, whole);
            for (i64 k = 0; k < whole; k += W) store(up + k, load(up + k) * load(own + k));
        }
    }

    // `width` rows of weights, as the columns of a panel, times the rows of a block.
    void linear(const Map<T, S>& map, i64 depth, i64 width, const float* const* rows, i64 count, auto* const* to,
                i64 stored) const {
        float padded_bias[kPanel] = {}, padded_scale[kPanel] = {};
        if (map.bias) widen_row(map.bias, padded_bias, width);
        if (map.scale) widen_row(map.scale, padded_scale, width);
        const auto pack = [&](i64 k, i64 deep, float* panel) {
            const i64 ahead = k + deep < depth ? deep : width * depth - k;
            pack_transposed(map.weight + k, depth, width, deep, panel, ahead);
            if (!map.scale) return;
            const i64 across = vectors_of(width) * W;
            for (i64 row = 0; row < deep; ++row)
                for (i64 at = 0; at < across; at += W) {
                    float* own = panel + row * across + at;
                    store(own, load(own) * load(padded_scale + at));
                }
        };
        product(pack, rows_of(rows), count, depth, stored, map.bias ? padded_bias : nullptr, to);
    }

    // Hidden neurons [column, end) of a block; rows of `hidden` and `gate` are the block's.
    void up(const Block& block, i64 column, i64 end, float* hidden, float* gate) const {
        const i64 e = block.mlp, offset = e * a.hidden;
        if (by_rows(block.count, a.d_in)) {
            const T* rows[kFew];
            for (i64 i = 0; i < block.count; ++i) rows[i] = x + plan.order[block.begin + i] * a.x_stride;
            const auto run = [&](const Map<T, S>& all, float* to) {
                const Map<T, S> map = all.from(offset + column, a.d_in);
                few(map.weight, end - column, a.d_in, map.scale, map.bias, rows, block.count,
                    [&](i64 n, i64 row, vf result, i64) { store(to + n * stride + column + row, result); });
            };
            run(up_map, hidden);
            if (gate) run(gate_map, gate);
            activate_columns(block, column, end - column, hidden, gate);
            return;
        }
        const float* rows[kBlock];
        inputs(block, rows);
        for (; column < end; column += kPanel) {
            const i64 width = least(kPanel, end - column);
            const auto run = [&](const Map<T, S>& all, float* into) {
                float* to[kBlock];
                for (i64 i = 0; i < block.count; ++i) to[i] = into + i * stride + column;
                // Whole vectors: what stands behind the last neuron is then a number too.
                linear(all.from(offset + column, a.d_in), a.d_in, width, rows, block.count, to, vectors_of(width) * W);
            };
            run(up_map, hidden);
            if (gate) run(gate_map, gate);
            activate_columns(block, column, width, hidden, gate);
        }
    }

    // Outputs [column, end) of a block.
    void down(const Block& block, i64 column, i64 end, const float* hidden) const {
        const i64 offset = block.mlp * a.d_out;
        const float* rows[kBlock];
        T* to[kBlock];
        for (i64 i = 0; i < block.count; ++i) {
            rows[i] = hidden + i * stride;
            to[i] = y + plan.order[block.begin + i] * a.d_out + column;
        }
        if (by_rows(block.count, a.hidden)) {
            const Map<T, S> map = down_map.from(offset + column, a.hidden);
            few(map.weight, end - column, a.hidden, map.scale, map.bias, rows, block.count,
                [&](i64 n, i64 row, vf result, i64 valid) { store_some(to[n] + row, result, valid); });
            return;
        }
        for (; column < end; column += kPanel) {
            const i64 width = least(kPanel, end - column);
            linear(down_map.from(offset + column, a.hidden), a.hidden, width, rows, block.count, to, width);
            for (i64 i = 0; i < block.count; ++i) to[i] += width;
        }
    }

    void run() {
        sort();
        const int usable = fastffn::usable_threads(a.threads);
        const int threads = threads_for(plan.count, a.tokens, a.hidden * (a.d_in + a.d_out), usable);
        if (plan.count >= 4 * threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
            for (i64 number = 0; number < plan.count; ++number) {
                const Block& block = plan.blocks[number];
                float* hidden = scratch_of<float>(kHidden, block.count * stride);
                float* gate = gate_map.weight ? scratch_of<float>(kGate, block.count * stride) : nullptr;
                up(block, 0, a.hidden, hidden, gate);
                down(block, 0, a.d_out, hidden);
            }
        } else {
            // Too few blocks to give every thread its share: they are divided by columns.
            float* hidden = scratch_of<float>(kHidden, a.tokens * stride);
            float* gate = gate_map.weight ? scratch_of<float>(kGate, a.tokens * stride) : nullptr;
            const i64 ups = (a.hidden + kPanel - 1) / kPanel, downs = (a.d_out + kPanel - 1) / kPanel;
#pragma omp parallel num_threads(threads) if (threads > 1)
            {
#pragma omp for schedule(static)
                for (i64 task = 0; task < plan.count * ups; ++task) {
                    const Block& block = plan.blocks[task / ups];
                    const i64 column = task % ups * kPanel, skip = block.begin * stride;
                    up(block, column, least(a.hidden, column + kPanel), hidden + skip, gate ? gate + skip : nullptr);
                }
#pragma omp for schedule(static)
                for (i64 task = 0; task < plan.count * downs; ++task) {
                    const Block& block = plan.blocks[task / downs];
                    const i64 column = task % downs * kPanel;
                    down(block, column, least(a.d_out, column + kPanel), hidden + block.begin * stride);
                }
            }
        }
        for (i64 i = plan.starts[a.mlps]; i < a.tokens; ++i)
            std::memset(y + plan.order[i] * a.d_out, 0, static_cast<std::size_t>(a.d_out) * sizeof(T));
    }
};

template <class T, class S>
void forward(const fastffn::MlpForward& args) {
    if (args.tokens == 0) {
        if (args.ends) std::memset(args.ends, 0, static_cast<std::size_t>(args.mlps) * sizeof(i32));
        return;
    }
    fastffn::prefer_large_pages(args.y, static_cast<std::size_t>(args.tokens * args.d_out) * sizeof(T));
    const std::size_t saved = static_cast<std::size_t>(args.tokens * args.hidden) * sizeof(T);
    fastffn::prefer_large_pages(args.up, saved);
    fastffn::prefer_large_pages(args.gate, saved);
    Forward<T, S>(args).run();
}

// Backward. First, by blocks of tokens: the gradients of what the activation got (kept, as floats, for all tokens), and
// of x. Then, by MLP and panel of columns, the gradients of the weights: sums over the tokens of an MLP in their order,
// in blocks of kDepth.
template <class T>
struct Backward {
    const fastffn::MlpBackward& a;
    const T *g, *x, *up_weight, *down_weight, *gate_weight, *up, *gate;
    i64 stride;
    Activation activation;
    bool inwards;  // is anything asked that lies before the activation
    Plan plan{};
    float *acts, *d_up, *d_gate;  // [T, stride]

    explicit Backward(const fastffn::MlpBackward& args)
        : a(args),
          g(static_cast<const T*>(args.gradient)),
          x(static_cast<const T*>(args.x)),
          up_weight(static_cast<const T*>(args.up_weight)),
          down_weight(static_cast<const T*>(args.down_weight)),
          gate_weight(static_cast<const T*>(args.gate_weight)),
          up(static_cast<const T*>(args.up)),
          gate(static_cast<const T*>(args.gate)),
          stride(padded(args.hidden)),
          activation(static_cast<Activation>(args.activation)),
          inwards(args.d_x || args.d_up_weight || args.d_up_bias || args.d_gate_weight || args.d_gate_bias) {}

    const T* gradient(i64 position) const { return g + plan.order[position] * a.d_out; }

    void outputs(const Block& block, const float** rows) const {
        if constexpr (sizeof(T) == sizeof(float)) {
            for (i64 i = 0; i < block.count; ++i) rows[i] = gradient(block.begin + i);
        } else {
            float* copy = scratch_of<float>(kFloats, block.count * padded(a.d_out));
            for (i64 i = 0; i < block.count; ++i) {
                float* to = copy + i * padded(a.d_out);
                widen_row(gradient(block.begin + i), to, a.d_out);
                rows[i] = to;
            }
        }
    }

    // Hidden neurons [column, end) of a block: activations, and gradients of what they got.
    void through_activation(const Block& block, i64 column, i64 end) const {
        const float* rows[kBlock];
        if (inwards) outputs(block, rows);
        for (; column < end; column += kPanel) {
            const i64 width = least(kPanel, end - column), whole = vectors_of(width) * W;
            if (inwards) {
                float* to[kBlock];
                for (i64 i = 0; i < block.count; ++i) to[i] = d_up + (block.begin + i) * stride + column;
                const T* weights = down_weight + block.mlp * a.d_out * a.hidden + column;
                product([&](i64 k, i64 deep, float* panel) {
                    pack_rows([&](i64 o) { return weights + (k + o) * a.hidden; }, width, deep, panel);
                }, rows_of(rows), block.count, a.d_out, whole, nullptr, to);
            }
            for (i64 i = block.begin; i < block.begin + block.count; ++i) {
                float own_up[kPanel], own[kPanel], slopes[kPanel];
                float *act = acts + i * stride + column, *to_up = d_up + i * stride + column;
                widen_row(up + i * a.hidden + column, own_up, width);
                if (!gate_weight) {
                    activate_all(activation, own_up, act, whole);
                    if (!inwards) continue;
                    slope_all(activation, own_up, slopes, whole);
                    for (i64 k = 0; k < whole; k += W) store(to_up + k, load(to_up + k) * load(slopes + k));
                    continue;
                }
                widen_row(gate + i * a.hidden + column, own, width);
                activate_all(activation, own, act, whole);
                if (inwards) {
                    float* to_gate = d_gate + i * stride + column;
                    slope_all(activation, own, slopes, whole);
                    for (i64 k = 0; k < whole; k += W) {
                        const vf d = load(to_up + k);
                        store(to_gate + k, d * load(own_up + k) * load(slopes + k));
                        store(to_up + k, d * load(act + k));
                    }
                }
                for (i64 k = 0; k < whole; k += W) store(act + k, load(act + k) * load(own_up + k));
            }
        }
    }

    // Columns [column, end) of the gradient of x.
    void to_x(const Block& block, i64 column, i64 end) const {
        const float *ups[kBlock], *gates[kBlock];
        T* to[kBlock];
        for (i64 i = 0; i < block.count; ++i) {
            ups[i] = d_up + (block.begin + i) * stride;
            gates[i] = d_gate + (block.begin + i) * stride;
            to[i] = static_cast<T*>(a.d_x) + plan.order[block.begin + i] * a.d_in + column;
        }
        for (; column < end; column += kPanel) {
            const i64 width = least(kPanel, end - column);
            const auto run = [&](const T* all, const float* const* rows, bool begun, bool goes_on) {
                const T* weights = all + block.mlp * a.hidden * a.d_in + column;
                product([&](i64 k, i64 deep, float* panel) {
                    pack_rows([&](i64 h) { return weights + (k + h) * a.d_in; }, width, deep, panel);
                }, rows_of(rows), block.count, a.hidden, width, nullptr, to, begun, goes_on);
            };
            run(up_weight, ups, false, gate_weight != nullptr);
            if (gate_weight) run(gate_weight, gates, true, false);
            for (i64 i = 0; i < block.count; ++i) to[i] += width;
        }
    }

    // Columns [column, column + width) of the gradient of up_weight or gate_weight.
    void to_up_weight(i64 e, i64 column, i64 width, const float* d, void* weights) const {
        const i64 begin = plan.starts[e], count = plan.starts[e + 1] - begin;
        T** to = scratch_of<T*>(kTo, a.hidden);
        for (i64 h = 0; h < a.hidden; ++h) to[h] = static_cast<T*>(weights) + (e * a.hidden + h) * a.d_in + column;
        product([&](i64 k, i64 deep, float* panel) {
            pack_rows([&](i64 t) { return x + plan.order[begin + k + t] * a.x_stride + column; }, width, deep, panel);
        }, columns_of(d + begin * stride, stride), a.hidden, count, width, nullptr, to);
    }

    void to_down(i64 e, i64 column, i64 width) const {
        const i64 begin = plan.starts[e], count = plan.starts[e + 1] - begin, vectors = vectors_of(width);
        vf bias[kVectors] = {};
        const auto pack = [&](i64 k, i64 deep, float* panel) {
            pack_rows([&](i64 t) { return gradient(begin + k + t) + column; }, width, deep, panel);
            for (i64 v = 0; v < vectors; ++v) {
                vf sum{};
                for (i64 t = 0; t < deep; ++t) sum += load(panel + (t * vectors + v) * W);
                bias[v] += sum;
            }
        };
        if (a.d_down_weight) {
            float* const* nowhere = nullptr;
            const auto left = columns_of(acts + begin * stride, stride);
            product(pack, left, a.hidden, count, width, nullptr, nowhere, false, true);
            // The sums are those of the transposed matrix: [H, kPanel].
            const float* sums = scratch_of<float>(kSumsSlot, a.hidden * kPanel);
            T* to = static_cast<T*>(a.d_down_weight) + (e * a.d_out + column) * a.hidden;
            for (i64 o = 0; o < width; o += W)
                for (i64 h = 0; h < a.hidden; h += W) {
                    const i64 high = least(W, a.hidden - h), wide = least(W, width - o);
                    vf rows[W];
                    for (i64 r = 0; r < W; ++r) rows[r] = r < high ? load(sums + (h + r) * kPanel + o) : vf{};
                    transpose(rows);
                    for (i64 r = 0; r < wide; ++r) store_some(to + (o + r) * a.hidden + h, rows[r], high);
                }
        } else {
            float* panel = scratch_of<float>(kPanelSlot, kDepth * kPanel);
            for (i64 k = 0; k < count; k += kDepth) pack(k, least(kDepth, count - k), panel);
        }
        if (!a.d_down_bias) return;
        T* to = static_cast<T*>(a.d_down_bias) + e * a.d_out + column;
        for (i64 v = 0; v < vectors; ++v) store_some(to + v * W, bias[v], least(W, width - v * W));
    }

    void to_bias(i64 e, const float* d, void* bias) const {
        for (i64 h = 0; h < a.hidden; h += W) {
            vf total{};
            for (i64 begin = plan.starts[e]; begin < plan.starts[e + 1]; begin += kDepth) {
                const i64 end = least(begin + kDepth, plan.starts[e + 1]);
                vf sum{};
                for (i64 t = begin; t < end; ++t) sum += load(d + t * stride + h);
                total += sum;
            }
            store_some(static_cast<T*>(bias) + e * a.hidden + h, total, least(W, a.hidden - h));
        }
    }

    void nothing(i64 e) const {
        const auto clear = [&](void* weights, i64 n) {
            if (weights) std::memset(static_cast<T*>(weights) + e * n, 0, static_cast<std::size_t>(n) * sizeof(T));
        };
        clear(a.d_up_weight, a.hidden * a.d_in);
        clear(a.d_up_bias, a.hidden);
        clear(a.d_down_weight, a.hidden * a.d_out);
        clear(a.d_down_bias, a.d_out);
        clear(a.d_gate_weight, a.hidden * a.d_in);
        clear(a.d_gate_bias, a.hidden);
    }

    void run() {
        plan.order = a.order;
        plan.starts = scratch_of<i64>(kPlan, a.mlps + 2 + 3 * most_blocks(a.tokens, a.mlps));
        plan.blocks = reinterpret_cast<Block*>(plan.starts + a.mlps + 2);
        plan.starts[0] = 0;
        for (i64 e = 0; e < a.mlps; ++e) plan.starts[e + 1] = a.ends[e];
        cut(plan, a.mlps);
        acts = scratch_of<float>(kHidden, (gate_weight ? 3 : 2) * a.tokens * stride);
        d_up = acts + a.tokens * stride;
        d_gate = gate_weight ? d_up + a.tokens * stride : d_up;
        const int usable = fastffn::usable_threads(a.threads);
        const int threads = threads_for(a.mlps, a.tokens, a.hidden * (a.d_in + a.d_out), usable);
        const bool whole = plan.count >= 4 * threads;
        const i64 middles = whole ? 1 : (a.hidden + kPanel - 1) / kPanel, ins = (a.d_in + kPanel - 1) / kPanel;
        const i64 outs = (a.d_out + kPanel - 1) / kPanel, in_parts = whole ? 1 : ins;
        const bool of_up = a.d_up_weight || a.d_gate_weight, of_down = a.d_down_weight || a.d_down_bias;
        const bool of_bias = a.d_up_bias || a.d_gate_bias;
        const i64 kinds = (of_up ? ins : 0) + (of_down ? outs : 0) + (of_bias ? 1 : 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(dynamic, 1)
            for (i64 task = 0; task < plan.count * middles; ++task) {
                const Block& block = plan.blocks[task / middles];
                const i64 column = task % middles * kPanel;
                through_activation(block, column, whole ? a.hidden : least(a.hidden, column + kPanel));
                if (whole && a.d_x) to_x(block, 0, a.d_in);
            }
            if (!whole && a.d_x) {
#pragma omp for schedule(dynamic, 1)
                for (i64 task = 0; task < plan.count * in_parts; ++task) {
                    const i64 column = task % in_parts * kPanel;
                    to_x(plan.blocks[task / in_parts], column, least(a.d_in, column + kPanel));
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (i64 task = 0; task < a.mlps * kinds; ++task) {
                const i64 e = task / kinds, kind = task % kinds;
                if (plan.starts[e] == plan.starts[e + 1]) {
                    if (kind == 0) nothing(e);
                } else if (of_up && kind < ins) {
                    const i64 column = kind * kPanel, width = least(kPanel, a.d_in - column);
                    if (a.d_up_weight) to_up_weight(e, column, width, d_up, a.d_up_weight);
                    if (a.d_gate_weight) to_up_weight(e, column, width, d_gate, a.d_gate_weight);
                } else if (const i64 out = kind - (of_up ? ins : 0); of_down && out < outs) {
                    to_down(e, out * kPanel, least(kPanel, a.d_out - out * kPanel));
                } else {
                    if (a.d_up_bias) to_bias(e, d_up, a.d_up_bias);
                    if (a.d_gate_bias) to_bias(e, d_gate, a.d_gate_bias);
                }
            }
        }
        if (!a.d_x) return;
        const std::size_t bytes = static_cast<std::size_t>(a.d_in) * sizeof(T);
        for (i64 i = plan.starts[a.mlps]; i < a.tokens; ++i)
            std::memset(static_cast<T*>(a.d_x) + plan.order[i] * a.d_in, 0, bytes);
    }
};

template <class T>
void backward(const fastffn::MlpBackward& args) {
    const auto prefer = [](void* memory, i64 rows, i64 width) {
        fastffn::prefer_large_pages(memory, static_cast<std::size_t>(rows * width) * sizeof(T));
    };
    prefer(args.d_x, args.tokens, args.d_in);
    prefer(args.d_up_weight, args.mlps * args.hidden, args.d_in);
    prefer(args.d_gate_weight, args.mlps * args.hidden, args.d_in);
    prefer(args.d_down_weight, args.mlps * args.hidden, args.d_out);
    Backward<T>(args).run();
}

const fastffn::MlpKernels kKernels = {
    {forward<float, float>, forward<bfloat16, bfloat16>, forward<float16, float16>},
    {forward<float, std::int8_t>, forward<bfloat16, std::int8_t>, forward<float16, std::int8_t>},
    {backward<float>, backward<bfloat16>, backward<float16>},
};

}  // namespace

namespace fastffn {

#define FASTFFN_JOIN_(a, b) a##b
#define FASTFFN_JOIN(a, b) FASTFFN_JOIN_(a, b)
const MlpKernels* FASTFFN_JOIN(mlp_kernels_, FASTFFN_ISA)() { return &kKernels; }

}  // namespace fastffn
