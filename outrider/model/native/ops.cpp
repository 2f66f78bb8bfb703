// Attention, matrix products and sampling of a ragged step on a CPU, as torch operators.
//
// Built at first use for the processor at hand (see native/__init__.py). Plain C++ with the compilers' vector
// extensions: they become AVX2, AVX-512 or NEON as the machine has them. All arithmetic is float32,
// whatever the storage, and a query's result depends on its own row only: not on the batch, nor on the number
// of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "rule.h"

#if defined(__FMA__) && defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int64_t kLanes = 8;
constexpr int64_t kBlock = 32;  // keys per softmax update; also tokens per KV block

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

inline Floats load(const at::BFloat16* from) {
  Words words;
  for (int64_t lane = 0; lane < kLanes; ++lane) words[lane] = from[lane].x;
  return reinterpret_cast<Floats>(words << 16);
}

inline void store(float* to, Floats values) { *reinterpret_cast<Floats*>(to) = values; }

// Sums over the lanes of four vectors.
inline void totals(Floats a, Floats b, Floats c, Floats d, float* to) {
  const Floats ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
                    __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  const Floats cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13) +
                    __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  const Floats all = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                     __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  for (int64_t lane = 0; lane < 4; ++lane) to[lane] = all[lane] + all[lane + 4];
}

inline float total(Floats values) {
  float sums[4];
  totals(values, values, values, values, sums);
  return sums[0];
}

inline float largest(Floats values) {
  values = __builtin_shufflevector(values, values, 4, 5, 6, 7, 0, 1, 2, 3) > values
               ? __builtin_shufflevector(values, values, 4, 5, 6, 7, 0, 1, 2, 3)
               : values;
  float best = values[0];
  for (int64_t lane = 1; lane < 4; ++lane) best = std::max(best, values[lane]);
  return best;
}

inline Floats splat(float value) { return value - Floats{}; }

// a * b + c. Written out where the machine has it: left to contraction, some compilers fuse or not depending on how
// many sums a loop has (avoid-fma-chains of GCC), so that a row would be rounded by the size of its company.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__FMA__) && defined(__AVX__)
  return reinterpret_cast<Floats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// exp for arguments in (-inf, 0], relative error below 2e-7 (Cephes' polynomial).
inline Floats exp_below_zero(Floats x) {
  const Floats least = splat(-87.0f);
  x = x < least ? least : x;
  const Floats scaled = x * 1.44269504088896341f - 0.5f;
  const Ints power = __builtin_convertvector(scaled, Ints);  // towards zero: rounds to nearest here
  const Floats whole = __builtin_convertvector(power, Floats);
  x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats y = splat(1.9875691500e-4f);
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * x * x + x + 1.0f;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(y) + (power << 23));
}

// --- attention ------------------------------------------------------------------------------------

// What a pass computes, beside the tensors of the layer: addresses, in the order of these fields, in one
// int64 tensor (StepPlan in attention.py builds it and keeps the arrays alive).
struct Plan {
  int64_t pool;            // [layers, 2, slots, kv_heads, dim]
  int64_t slots;
  const int64_t* write;    // [tokens] slot of each new token
  const int32_t* tasks;    // [count, 2] token range of each unit of work; all its tokens are of one row
  int64_t task_count;
  const int32_t* row;      // [tokens] batch row of each token
  const int32_t* limit;    // [tokens] keys of the row below this are visible, if not too far back
  const int32_t* length;   // [rows] keys of each row, the new ones included
  const int32_t* table;    // [rows, blocks] pool block of each of the row's blocks
  int64_t blocks;
  const int32_t* kind;     // [layers] which of the window kinds that follow a layer has
};

// Visibility under one sliding window, or none.
struct Window {
  const int32_t* low;      // [tokens] keys below this are too far back
  const int64_t* mask;     // [tokens] where the visibility of the keys from `limit` on begins; -1: none is
  const uint8_t* visible;
};

static_assert(sizeof(Plan) == 11 * sizeof(int64_t) && sizeof(Window) == 3 * sizeof(int64_t));

constexpr int64_t kQueries = 4;  // queries computed together: they share the reading of keys and values

// Attention of some tokens of a row under one KV head. Holds the scratch memory of one thread.
//
// Keys are taken a block at a time, with a running softmax (FlashAttention, arXiv 2205.14135).
template <typename T>
struct Worker {
  int64_t heads, kv_heads, dim, padded, group;
  float scaling;
  std::vector<float> keys, values, queries, sums, scores, best, weight;

  void run(const Plan& plan, const Window& window, const T* query, const T* pool_keys, const T* pool_values,
           T* out, int64_t token_begin, int64_t token_end, int64_t kv_head) {
    const int64_t count = (token_end - token_begin) * group;
    const int64_t row = plan.row[token_begin], length = plan.length[row];
    queries.assign(count * padded, 0.0f);
    sums.assign(count * padded, 0.0f);
    scores.resize(kQueries * kBlock);
    best.assign(count, kNone);
    weight.assign(count, 0.0f);
    int64_t first = length, last = 0;
    for (int64_t token = token_begin; token < token_end; ++token) {
      first = std::min<int64_t>(first, window.low[token]);
      last = std::max<int64_t>(last, window.mask[token] < 0 ? plan.limit[token] : length);
      for (int64_t g = 0; g < group; ++g) {
        const T* from = query + (token * heads + kv_head * group + g) * dim;
        float* to = &queries[((token - token_begin) * group + g) * padded];
        for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d]) * scaling;
      }
    }
    // Few queries read the pool as it is; many share a widened copy of the block.
    const bool direct = count <= 2 * kQueries && padded == dim;
    if (!direct) {
      keys.assign(kBlock * padded, 0.0f);
      values.assign(kBlock * padded, 0.0f);
    }
    for (int64_t start = first / kBlock * kBlock; start < last; start += kBlock) {
      const int64_t slot = static_cast<int64_t>(plan.table[row * plan.blocks + start / kBlock]) * kBlock;
      const int64_t size = std::min(kBlock, length - start), at = (slot * kv_heads + kv_head) * dim;
      if (direct) {
        block(plan, window, token_begin, count, start, size, pool_keys + at, pool_values + at, kv_heads * dim);
      } else {
        widen(pool_keys + at, keys.data(), size);
        widen(pool_values + at, values.data(), size);
        block<float>(plan, window, token_begin, count, start, size, keys.data(), values.data(), padded);
      }
    }
    for (int64_t q = 0; q < count; ++q) {
      const int64_t token = token_begin + q / group, head = kv_head * group + q % group;
      T* to = out + (token * heads + head) * dim;
      const float inverse = 1.0f / weight[q];
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(sums[q * padded + d] * inverse);
    }
  }

 private:
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  void widen(const T* from, float* to, int64_t size) const {
    const int64_t stride = kv_heads * dim, whole = dim / kLanes * kLanes;
    for (int64_t key = 0; key < size; ++key, from += stride, to += padded) {
      for (int64_t d = 0; d < whole; d += kLanes) store(to + d, load(from + d));
      for (int64_t d = whole; d < dim; ++d) to[d] = static_cast<float>(from[d]);
    }
  }

  // One block of keys for all queries. S: storage of keys and values, `stride` apart.
  template <typename S>
  void block(const Plan& plan, const Window& window, int64_t token_begin, int64_t count, int64_t start,
             int64_t size, const S* k, const S* v, int64_t stride) {
    for (int64_t q = 0; q < count; q += kQueries) {
      switch (std::min(kQueries, count - q)) {
        case 4: some<4>(plan, window, token_begin, q, start, size, k, v, stride); break;
        case 3: some<3>(plan, window, token_begin, q, start, size, k, v, stride); break;
        case 2: some<2>(plan, window, token_begin, q, start, size, k, v, stride); break;
        default: some<1>(plan, window, token_begin, q, start, size, k, v, stride);
      }
    }
  }

  template <int64_t kCount, typename S>
  void some(const Plan& plan, const Window& window, int64_t token_begin, int64_t q, int64_t start, int64_t size,
            const S* k, const S* v, int64_t stride) {
    bool any = false;
    for (int64_t i = 0; i < kCount; ++i) {
      const int64_t token = token_begin + (q + i) / group;
      const int64_t low = window.low[token], limit = plan.limit[token];
      any |= (start < limit && start + size > low) || (window.mask[token] >= 0 && start + size > limit);
    }
    if (!any) return;
    dot_products<kCount>(&queries[q * padded], k, stride, size);
    for (int64_t i = 0; i < kCount; ++i) {
      hide(plan, window, token_begin + (q + i) / group, start, size, &scores[i * kBlock]);
      soften(q + i, &scores[i * kBlock]);
    }
    add_values<kCount>(&sums[q * padded], v, stride, size);
  }

  template <int64_t kCount, typename S>
  void dot_products(const float* query, const S* k, int64_t stride, int64_t size) {
    int64_t key = 0;
    for (; key + 2 <= size; key += 2, k += 2 * stride) {
      Floats acc[kCount][2] = {};
      for (int64_t d = 0; d < padded; d += kLanes) {
        const Floats one = load(k + d), two = load(k + stride + d);
        for (int64_t i = 0; i < kCount; ++i) {
          const Floats x = load(query + i * padded + d);
          acc[i][0] = fused(x, one, acc[i][0]);
          acc[i][1] = fused(x, two, acc[i][1]);
        }
      }
      for (int64_t i = 0; i < kCount; i += 2) {
        const int64_t j = std::min(i + 1, kCount - 1);
        float four[4];
        totals(acc[i][0], acc[i][1], acc[j][0], acc[j][1], four);
        scores[i * kBlock + key] = four[0];
        scores[i * kBlock + key + 1] = four[1];
        scores[j * kBlock + key] = four[2];
        scores[j * kBlock + key + 1] = four[3];
      }
    }
    for (; key < size; ++key, k += stride)
      for (int64_t i = 0; i < kCount; ++i) {
        Floats acc{};
        for (int64_t d = 0; d < padded; d += kLanes) acc = fused(load(query + i * padded + d), load(k + d), acc);
        scores[i * kBlock + key] = total(acc);
      }
  }

  void hide(const Plan& plan, const Window& window, int64_t token, int64_t start, int64_t size, float* score) const {
    const int64_t low = window.low[token], limit = plan.limit[token], mask = window.mask[token];
    for (int64_t key = size; key < kBlock; ++key) score[key] = kNone;
    if (start >= low && start + size <= limit) return;
    for (int64_t key = 0; key < size; ++key) {
      const int64_t at = start + key;
      const bool seen = at < limit ? at >= low : mask >= 0 && window.visible[mask + at - limit];
      if (!seen) score[key] = kNone;
    }
  }

  // Turns scores into weights relative to the running maximum; rescales what was summed under an older one.
  void soften(int64_t q, float* score) {
    Floats high = load(score);
    for (int64_t key = kLanes; key < kBlock; key += kLanes) {
      const Floats x = load(score + key);
      high = x > high ? x : high;
    }
    const float top = largest(high);
    if (top > best[q]) {
      const float shrink = best[q] == kNone ? 0.0f : std::exp(best[q] - top);
      float* sum = &sums[q * padded];
      for (int64_t d = 0; d < padded; d += kLanes) store(sum + d, load(sum + d) * shrink);
      weight[q] *= shrink;
      best[q] = top;
    }
    const Floats none = splat(kNone);
    Floats added{};
    for (int64_t key = 0; key < kBlock; key += kLanes) {
      const Floats x = load(score + key);
      const Floats seen = x == none ? Floats{} : exp_below_zero(x - best[q]);
      store(score + key, seen);
      added += seen;
    }
    weight[q] += total(added);
  }

  template <int64_t kCount, typename S>
  void add_values(float* sum, const S* v, int64_t stride, int64_t size) const {
    for (int64_t d = 0; d < padded; d += kLanes) {
      Floats acc[kCount];
      for (int64_t i = 0; i < kCount; ++i) acc[i] = load(sum + i * padded + d);
      const S* from = v + d;
      for (int64_t key = 0; key < size; ++key, from += stride) {
        const Floats value = load(from);
        for (int64_t i = 0; i < kCount; ++i) acc[i] = fused(splat(scores[i * kBlock + key]), value, acc[i]);
      }
      for (int64_t i = 0; i < kCount; ++i) store(sum + i * padded + d, acc[i]);
    }
  }
};

template <typename T>
void attend_typed(const T* query, const T* key, const T* value, T* out, const Plan& plan, const Window& window,
                  int64_t layer, Worker<T> prototype, int64_t tokens) {
  const int64_t width = prototype.kv_heads * prototype.dim, size = plan.slots * width;
  T* pool_keys = reinterpret_cast<T*>(plan.pool) + layer * 2 * size;
  T* pool_values = pool_keys + size;
  for (int64_t token = 0; token < tokens; ++token) {
    std::memcpy(pool_keys + plan.write[token] * width, key + token * width, width * sizeof(T));
    std::memcpy(pool_values + plan.write[token] * width, value + token * width, width * sizeof(T));
  }
  const int64_t kv_heads = prototype.kv_heads;
  at::parallel_for(0, plan.task_count * kv_heads, 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker = prototype;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int32_t* range = plan.tasks + unit / kv_heads * 2;
      worker.run(plan, window, query, pool_keys, pool_values, out, range[0], range[1], unit % kv_heads);
    }
  });
}

// query [tokens, heads, dim], key and value [tokens, kv_heads, dim]; returns [tokens, heads, dim].
Tensor attend(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const Tensor& plan_in,
              int64_t layer, double scaling) {
  const Tensor query = query_in.contiguous(), key = key_in.contiguous(), value = value_in.contiguous();
  Tensor out = at::empty(query.sizes(), query.options());
  const int64_t* words = plan_in.const_data_ptr<int64_t>();
  Plan plan;
  std::memcpy(&plan, words, sizeof(Plan));
  Window window;
  std::memcpy(&window, words + sizeof(Plan) / sizeof(int64_t) + 3 * plan.kind[layer], sizeof(Window));
  const int64_t heads = query.size(1), kv_heads = key.size(1), dim = query.size(2);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Worker<T> worker{heads, kv_heads, dim, (dim + kLanes - 1) / kLanes * kLanes, heads / kv_heads,
                     static_cast<float>(scaling), {}, {}, {}, {}, {}, {}, {}};
    attend_typed<T>(query.const_data_ptr<T>(), key.const_data_ptr<T>(), value.const_data_ptr<T>(),
                    out.mutable_data_ptr<T>(), plan, window, layer, worker, query.size(0));
  };
  if (query.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    TORCH_CHECK(query.scalar_type() == at::kBFloat16, "attend: float32 and bfloat16 only");
    run(at::BFloat16{});
  }
  return out;
}

// --- products of few rows ------------------------------------------------------------------------------

constexpr int64_t kPanel = 16;  // outputs computed together
constexpr int64_t kTile = 6;    // rows computed together: with kPanel they fill sixteen vector registers
// Bytes of the weights that are asked for ahead of their use. Left to itself the processor looks ahead by some lines
// only, and few rows wait for memory: in bfloat16 products of up to 8 rows became faster with it on a Zen 3, in float32
// the difference was within noise.
constexpr int64_t kAhead = 2048;
constexpr int64_t kLine = 64;

// How a panel stores the weights of one input. Float32: kPanel floats. Bfloat16: kLanes words, each with outputs
// `lane` (low half) and `lane + kLanes`: a shift and a mask widen both, with no shuffling.
template <typename T>
struct Panel;

template <>
struct Panel<float> {
  using Word = float;
  static constexpr int64_t kWords = kPanel;
  static void put(Word* to, int64_t output, float weight) { to[output] = weight; }
  static void widen(const Word* from, Floats& low, Floats& high) {
    low = load(from);
    high = load(from + kLanes);
  }
};

template <>
struct Panel<at::BFloat16> {
  using Word = uint32_t;
  static constexpr int64_t kWords = kLanes;
  static void put(Word* to, int64_t output, at::BFloat16 weight) {
    to[output % kLanes] |= static_cast<uint32_t>(weight.x) << (output / kLanes * 16);
  }
  static void widen(const Word* from, Floats& low, Floats& high) {
    const Words words = *reinterpret_cast<const Words*>(from);
    low = reinterpret_cast<Floats>(words << 16);
    high = reinterpret_cast<Floats>(words & 0xffff0000u);
  }
};

template <typename T>
void pack_typed(const T* from, typename Panel<T>::Word* to, int64_t outputs, int64_t inputs) {
  at::parallel_for(0, (outputs + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t output = begin * kPanel; output < std::min(outputs, end * kPanel); ++output)
      for (int64_t input = 0; input < inputs; ++input)
        Panel<T>::put(to + (output / kPanel * inputs + input) * Panel<T>::kWords, output % kPanel,
                      from[output * inputs + input]);
  });
}

// [outputs, inputs] float32 or bfloat16 to [panels, inputs, words]: float32, or int32 with two bfloat16 each.
// Zeros stand behind the last output.
Tensor pack_weight(const Tensor& weight_in) {
  const Tensor weight = weight_in.contiguous();
  TORCH_CHECK(weight.dim() == 2, "pack_weight: [out, in] only");
  const int64_t outputs = weight.size(0), inputs = weight.size(1), panels = (outputs + kPanel - 1) / kPanel;
  if (weight.scalar_type() == at::kFloat) {
    Tensor packed = at::zeros({panels, inputs, Panel<float>::kWords}, weight.options());
    pack_typed(weight.const_data_ptr<float>(), packed.mutable_data_ptr<float>(), outputs, inputs);
    return packed;
  }
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "pack_weight: float32 and bfloat16 only");
  Tensor packed = at::zeros({panels, inputs, Panel<at::BFloat16>::kWords}, weight.options().dtype(at::kInt));
  pack_typed(weight.const_data_ptr<at::BFloat16>(), reinterpret_cast<uint32_t*>(packed.mutable_data_ptr()), outputs,
             inputs);
  return packed;
}

// `kFirst`: nobody has read this panel yet.
template <typename T, int64_t kRows, bool kFirst>
void tile_product(const float* x, const typename Panel<T>::Word* panel, const float* bias, int64_t inputs,
                  int64_t outputs, int64_t first, T* out) {
  Floats sums[kRows][2] = {};
  constexpr int64_t kWordBytes = sizeof(typename Panel<T>::Word), kPerLine = kLine / (Panel<T>::kWords * kWordBytes);
  for (int64_t input = 0; input < inputs; ++input, panel += Panel<T>::kWords) {
    // Beyond the last panel it asks for what is not there, which is harmless.
    if (kFirst && input % kPerLine == 0) __builtin_prefetch(panel + kAhead / kWordBytes);
    Floats low, high;
    Panel<T>::widen(panel, low, high);
    for (int64_t row = 0; row < kRows; ++row) {
      const Floats factor = splat(x[row * inputs + input]);
      sums[row][0] = fused(factor, low, sums[row][0]);
      sums[row][1] = fused(factor, high, sums[row][1]);
    }
  }
  const int64_t count = std::min(kPanel, outputs - first);
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t output = 0; output < count; ++output) {
      const float sum = sums[row][output / kLanes][output % kLanes];
      out[row * outputs + first + output] = static_cast<T>(bias == nullptr ? sum : sum + bias[first + output]);
    }
}

template <typename T>
void multiply(const float* x, const typename Panel<T>::Word* weights, const float* bias, T* out, int64_t rows,
              int64_t inputs, int64_t outputs) {
  at::parallel_for(0, (outputs + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const auto* weight = weights + panel * inputs * Panel<T>::kWords;
      for (int64_t row = 0; row < rows;) {
        const auto tile = [&](auto size) {
          constexpr int64_t kRows = decltype(size)::value;
          const auto product = row == 0 ? tile_product<T, kRows, true> : tile_product<T, kRows, false>;
          product(x + row * inputs, weight, bias, inputs, outputs, panel * kPanel, out + row * outputs);
          row += kRows;
        };
        switch (std::min(kTile, rows - row)) {
          case 6: tile(std::integral_constant<int64_t, 6>{}); break;
          case 5: tile(std::integral_constant<int64_t, 5>{}); break;
          case 4: tile(std::integral_constant<int64_t, 4>{}); break;
          case 3: tile(std::integral_constant<int64_t, 3>{}); break;
          case 2: tile(std::integral_constant<int64_t, 2>{}); break;
          default: tile(std::integral_constant<int64_t, 1>{});
        }
      }
    }
  });
}

// x [rows, inputs] float32 or bfloat16, weight packed as above from the same, bias float32 [outputs]; returns
// [rows, outputs] like x.
Tensor packed_linear(const Tensor& x_in, const Tensor& packed, const std::optional<Tensor>& bias_in, int64_t outputs) {
  const Tensor x = x_in.contiguous();
  const int64_t rows = x.size(0), inputs = x.size(1);
  TORCH_CHECK(packed.size(1) == inputs, "packed_linear: ", inputs, " inputs for a weight of ", packed.size(1));
  const float* bias = bias_in.has_value() ? bias_in->const_data_ptr<float>() : nullptr;
  Tensor out = at::empty({rows, outputs}, x.options());
  if (x.scalar_type() == at::kFloat) {
    multiply<float>(x.const_data_ptr<float>(), packed.const_data_ptr<float>(), bias, out.mutable_data_ptr<float>(),
                    rows, inputs, outputs);
    return out;
  }
  const auto* narrow = x.const_data_ptr<at::BFloat16>();
  std::vector<float> wide(narrow, narrow + rows * inputs);
  multiply<at::BFloat16>(wide.data(), reinterpret_cast<const uint32_t*>(packed.const_data_ptr()), bias,
                         out.mutable_data_ptr<at::BFloat16>(), rows, inputs, outputs);
  return out;
}

// --- sampling ----------------------------------------------------------------------------------------

// The best `count` tokens of each row by the one rule: tokens int64 [rows, count], their scores float64 [rows, count],
// and the rows decided, bool [rows]. Logits float32 [rows, vocabulary]; filters float64 [rows, 3]: temperature (0: the
// most probable token is wanted), least scaled logit, top-p; places int64 [rows, 3]: seed, position, top-k. Where the
// filters leave fewer tokens, the others are 0 and their scores -inf.
std::tuple<Tensor, Tensor, Tensor> draw(const Tensor& logits_in, const Tensor& filters, const Tensor& places,
                                        int64_t count) {
  const Tensor logits = logits_in.contiguous();
  const int64_t rows = logits.size(0), size = logits.size(1);
  TORCH_CHECK(filters.is_contiguous() && filters.size(0) == rows && filters.size(1) == 3, "draw: filters [rows, 3]");
  TORCH_CHECK(places.is_contiguous() && places.size(0) == rows && places.size(1) == 3, "draw: places [rows, 3]");
  TORCH_CHECK(size > 0 && count > 0, "draw: no tokens");
  Tensor tokens = at::zeros({rows, count}, logits.options().dtype(at::kLong));
  const double none = -std::numeric_limits<double>::infinity();
  Tensor scores = at::full({rows, count}, none, logits.options().dtype(at::kDouble));
  Tensor decided = at::empty({rows}, logits.options().dtype(at::kBool));
  const float* from = logits.const_data_ptr<float>();
  const double* filter = filters.const_data_ptr<double>();
  const int64_t* place = places.const_data_ptr<int64_t>();
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  double* score = scores.mutable_data_ptr<double>();
  bool* done = decided.mutable_data_ptr<bool>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    rule::Row row(size);
    std::vector<rule::Guess> found;
    for (int64_t i = begin; i < end; ++i) {
      const double* at = filter + 3 * i;
      const rule::Filters given{static_cast<float>(at[0]), static_cast<float>(at[1]), at[2], place[3 * i + 2]};
      const rule::Place where{static_cast<uint64_t>(place[3 * i]), static_cast<uint64_t>(place[3 * i + 1])};
      done[i] = row.run(from + i * size, given, where, count, found);
      for (size_t rank = 0; rank < found.size(); ++rank) {
        token[i * count + rank] = found[rank].token;
        score[i * count + rank] = found[rank].score;
      }
    }
  });
  return {tokens, scores, decided};
}

}  // namespace

TORCH_LIBRARY(outrider, library) {
  library.def("attend(Tensor query, Tensor key, Tensor value, Tensor plan, SymInt layer, float scaling) -> Tensor");
  library.def("draw(Tensor logits, Tensor filters, Tensor places, int count) -> (Tensor, Tensor, Tensor)");
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, SymInt outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(outrider, CPU, library) {
  library.impl("attend", &attend);
  library.impl("draw", &draw);
  library.impl("pack_weight", &pack_weight);
  library.impl("packed_linear", &packed_linear);
}
