// The one rule at one row of logits: what sampling.py defines, without a look at tokens that cannot win.
//
// Needs nothing of torch. Decisions are those of the definition: floors are compared with the same float32 logits,
// words are the same integers, and where the end of a nucleus is too close to call the row is handed back undecided.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rule {

constexpr int64_t kSpan = 64;  // tokens that are passed over together
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// Lanes of what lies anywhere in arrays of numbers. Names are written out: `auto` would forget the alignment.
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(32), aligned(8), may_alias));
typedef int64_t Signed __attribute__((vector_size(32), aligned(8), may_alias));
typedef uint64_t Longs __attribute__((vector_size(32), aligned(8), may_alias));

// --- noise: Philox4x32-10 as in noise.py --------------------------------------------------------------

constexpr uint64_t kDomain = 0x4F555452, kLow = 0xFFFFFFFF;
constexpr uint64_t kMultipliers[2] = {0xD2511F53, 0xCD9E8D57}, kWeyl[2] = {0x9E3779B9, 0xBB67AE85};
constexpr int kRounds = 10, kShift = 8;
constexpr double kBuckets = 1 << 24;
constexpr double kGumbelMax = 17.33;  // rounded up

inline Longs all(uint64_t value) { return value - Longs{}; }

// Products of the lower halves.
inline Longs product(Longs a, uint64_t b) {
#if defined(__AVX2__)
  return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#else
  return (a & kLow) * b;
#endif
}

// Words of the 32 tokens from `first` on, a multiple of 4: to[lane * 8 + i] is that of token first + 4 * i + lane.
inline void hash(uint64_t seed, uint64_t position, int64_t first, uint64_t* to) {
  constexpr int kGroups = 2;
  Longs c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    c0[g] = all(first / 4 + 4 * g) + Longs{0, 1, 2, 3};
    c1[g] = all(position);
    c2[g] = all(kDomain);
    c3[g] = Longs{};
  }
  uint64_t key0 = seed & kLow, key1 = seed >> 32;
  for (int round = 0; round < kRounds; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      const Longs p0 = product(c0[g], kMultipliers[0]), p1 = product(c2[g], kMultipliers[1]);
      // What is above the lower half is rubbish, which no product reads.
      c0[g] = (p1 >> 32) ^ c1[g] ^ all(key0);
      c2[g] = (p0 >> 32) ^ c3[g] ^ all(key1);
      c1[g] = p1;
      c3[g] = p0;
    }
    key0 = (key0 + kWeyl[0]) & kLow;
    key1 = (key1 + kWeyl[1]) & kLow;
  }
  for (int g = 0; g < kGroups; ++g) {
    *reinterpret_cast<Longs*>(to + 4 * g) = c0[g] & kLow;
    *reinterpret_cast<Longs*>(to + 4 * g + 8) = c1[g] & kLow;
    *reinterpret_cast<Longs*>(to + 4 * g + 16) = c2[g] & kLow;
    *reinterpret_cast<Longs*>(to + 4 * g + 24) = c3[g] & kLow;
  }
}

inline double gumbel(uint64_t word) {
  return -std::log(-std::log((static_cast<double>(word >> kShift) + 0.5) / kBuckets));
}

// A word below which noise is less than `needed`. Since 1 - u <= -log u, enough noise takes 1 - u <= exp(-needed).
inline uint64_t least_word(double needed) {
  const double misses = static_cast<double>(std::exp(static_cast<float>(-needed))) * (1 + 1e-4);
  const double bucket = kBuckets * (1 - misses) - 2;
  return bucket > 0 ? static_cast<uint64_t>(bucket) << kShift : 0;
}

// --- weights ------------------------------------------------------------------------------------------

// exp for arguments up to 0, relative error below 1e-12; what is below -700 counts as that.
inline Doubles weights(Doubles x) {
  const Doubles least = -700.0 - Doubles{}, magic = 0x1.8p52 - Doubles{};
  x = x > least ? x : least;
  const Doubles shifted = x * 1.4426950408889634 + magic;  // its lowest bits are the power of two
  const Doubles power = shifted - magic;
  x = x - power * 6.93147180369123816490e-01 - power * 1.90821492927058770002e-10;
  Doubles y = x * (1.0 / 3628800) + 1.0 / 362880;
  y = y * x + 1.0 / 40320;
  y = y * x + 1.0 / 5040;
  y = y * x + 1.0 / 720;
  y = y * x + 1.0 / 120;
  y = y * x + 1.0 / 24;
  y = y * x + 1.0 / 6;
  y = y * x + 0.5;
  y = y * x + 1.0;
  y = y * x + 1.0;
  return reinterpret_cast<Doubles>(reinterpret_cast<Longs>(y) + (reinterpret_cast<Longs>(shifted) << 52));
}

inline Doubles weights(const float* scaled) {
  return weights(__builtin_convertvector(*reinterpret_cast<const Four*>(scaled), Doubles));
}

inline double total(Doubles values) { return (values[0] + values[1]) + (values[2] + values[3]); }

// --- a row --------------------------------------------------------------------------------------------

struct Filters {
  float divisor;   // temperature; 0: the most probable token is wanted
  float floor;     // of min-p
  double top_p;    // 1: none
  int64_t top_k;   // 0: none
};

struct Place {
  uint64_t seed, position;
};

struct Guess {
  double score;
  int64_t token;
  bool operator<(const Guess& other) const {  // the better one comes first
    return score != other.score ? score > other.score : token < other.token;
  }
};

// Holds the scratch memory of one thread.
class Row {
 public:
  explicit Row(int64_t size)
      : size_(size), scaled_((size + kSpan - 1) / kSpan * kSpan), tops_(scaled_.size() / kSpan) {}

  // The best `count` perturbed scores, in order; fewer if the filters leave fewer. False: undecided.
  bool run(const float* logits, const Filters& filters, const Place& place, size_t count, std::vector<Guess>& found) {
    found.clear();
    if (filters.divisor == 0) {
      found.push_back({0.0, most_probable(repaired(logits))});
      return true;
    }
    scale(repaired(logits), filters.divisor);
    float floor = -kLargest;
    if (!raise(floor, filters)) return false;
    draw(std::max(floor, filters.floor), place, count, found);
    return true;
  }

 private:
  static constexpr double kShareError = 1e-10;  // relative; more than sums in float64 lose
  static constexpr float kNegligible = -45;     // a whole vocabulary of these weighs nothing
  static constexpr float kNear = -3;            // spans this good are looked at first
  static constexpr int64_t kBins = 512;

  int64_t size_;
  float best_ = 0;
  std::vector<float> scaled_, tops_, repaired_, some_;

  // NaN counts as -inf, +inf as the largest float, and a row without any finite logit as flat.
  const float* repaired(const float* logits) {
    Eight tops = -kInfinity - Eight{};
    decltype(tops > tops) broken{};
    const int64_t whole = size_ / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
      const Eight values = *reinterpret_cast<const Eight*>(logits + i);
      tops = values > tops ? values : tops;
      broken |= values != values;
    }
    best_ = -kInfinity;
    bool sound = true;
    for (int64_t lane = 0; lane < 8; ++lane) {
      best_ = std::max(best_, tops[lane]);
      sound &= broken[lane] == 0;
    }
    for (int64_t i = whole; i < size_; ++i) {
      if (logits[i] > best_) best_ = logits[i];
      sound &= !std::isnan(logits[i]);
    }
    if (sound && std::isfinite(best_)) return logits;
    repaired_.resize(size_);
    const bool empty = best_ == -kInfinity;
    best_ = empty ? 0 : std::min(best_, kLargest);
    for (int64_t i = 0; i < size_; ++i)
      repaired_[i] = empty ? 0 : std::isnan(logits[i]) ? -kInfinity : std::min(logits[i], kLargest);
    return repaired_.data();
  }

  int64_t most_probable(const float* logits) const { return std::find(logits, logits + size_, best_) - logits; }

  void scale(const float* logits, float divisor) {
    for (int64_t i = 0; i < size_; ++i) scaled_[i] = (logits[i] - best_) / divisor;
    std::fill(scaled_.begin() + size_, scaled_.end(), -kInfinity);
    for (size_t span = 0; span < tops_.size(); ++span) {
      const Eight* from = reinterpret_cast<const Eight*>(&scaled_[span * kSpan]);
      Eight tops = from[0];
      for (int64_t i = 1; i < kSpan / 8; ++i) tops = from[i] > tops ? from[i] : tops;
      tops_[span] = tops[0];
      for (int64_t lane = 1; lane < 8; ++lane) tops_[span] = std::max(tops_[span], tops[lane]);
    }
  }

  // Collects the scaled logits that reach `least`.
  void collect(float least) {
    some_.resize(scaled_.size() + 4);
    int64_t count = 0;
    for (size_t span = 0; span < tops_.size(); ++span) {
      if (tops_[span] < least) continue;
      const float* from = &scaled_[span * kSpan];
      for (int64_t i = 0; i < kSpan; ++i) {
        some_[count] = from[i];
        count += from[i] >= least;
      }
    }
    some_.resize(count);
  }

  double mass() const {
    Doubles sums[2] = {};
    for (size_t span = 0; span < tops_.size(); ++span) {
      if (tops_[span] < kNegligible) continue;
      for (int64_t i = span * kSpan; i < static_cast<int64_t>(span + 1) * kSpan; i += 8) {
        sums[0] += weights(&scaled_[i]);
        sums[1] += weights(&scaled_[i + 4]);
      }
    }
    return total(sums[0] + sums[1]);
  }

  // Raises the floor to that of top-k and top-p. False: undecided.
  bool raise(float& floor, const Filters& filters) {
    if (filters.top_k > 0 && filters.top_k < size_) {
      const float least = kth_best(filters.top_k);
      if (filters.top_p >= 1) {
        floor = least;
        return true;
      }
      collect(least);
      double sum = 0;
      for (const float scaled : some_) sum += std::exp(static_cast<double>(scaled));
      return end_nucleus(floor, filters.top_p, sum, least);
    }
    if (filters.top_p >= 1) return true;
    const double sum = mass();
    // Everything below this weighs, all together, less than the share that top-p drops.
    const float lowest = static_cast<float>(std::log((1 - filters.top_p) * sum / size_) - 1e-3);
    collect(lowest);
    return end_nucleus(floor, filters.top_p, sum, lowest);
  }

  // The least of the k best scaled logits, if they are finite.
  float kth_best(int64_t k) {
    float least = -kLargest;
    if (k <= static_cast<int64_t>(tops_.size())) {
      some_ = tops_;
      std::nth_element(some_.begin(), some_.begin() + (k - 1), some_.end(), std::greater<float>());
      least = std::max(least, some_[k - 1]);
    }
    collect(least);
    if (static_cast<int64_t>(some_.size()) < k) return -kLargest;
    std::nth_element(some_.begin(), some_.begin() + (k - 1), some_.end(), std::greater<float>());
    return some_[k - 1];
  }

  // Sets the floor to the least logit of the nucleus; all logits from `lowest` on are collected. Weights are summed
  // in bins, of which only the one where the nucleus ends is sorted.
  bool end_nucleus(float& floor, double top_p, double sum, float lowest) {
    const double low = (top_p - kShareError) * sum, high = (top_p + kShareError) * sum;
    const float rate = kBins / std::max(-kLargest, std::min(lowest, -1e-6f));
    const auto bin_of = [&](float scaled) {
      return static_cast<int64_t>(std::min(scaled * rate, static_cast<float>(kBins - 1)));
    };
    const int64_t count = some_.size();
    double bins[kBins] = {};
    some_.resize(count + 4, 0.0f);
    for (int64_t i = 0; i < count; i += 4) {
      const Doubles four = weights(&some_[i]);
      const int64_t lanes = std::min<int64_t>(4, count - i);
      for (int64_t lane = 0; lane < lanes; ++lane) bins[bin_of(some_[i + lane])] += four[lane];
    }
    double before = 0;
    int64_t last = 0;
    while (last < kBins && before + bins[last] < high) before += bins[last++];
    if (last == kBins || (before >= low && before > 0)) return false;
    some_.resize(count);
    some_.erase(std::remove_if(some_.begin(), some_.end(), [&](float scaled) { return bin_of(scaled) != last; }),
                some_.end());
    const auto [least, most] = std::minmax_element(some_.begin(), some_.end());
    floor = *most;
    if (*least == *most) return true;
    std::sort(some_.begin(), some_.end(), std::greater<float>());
    // The first whose predecessors weigh enough, by the larger share and by the smaller.
    float ends = floor;
    for (const float scaled : some_) {
      if (before < low) floor = scaled;
      if (before >= high) break;
      ends = scaled;
      before += std::exp(static_cast<double>(scaled));
    }
    return floor == ends;
  }

  void draw(float floor, const Place& place, size_t count, std::vector<Guess>& found) const {
    // Good spans first: the sooner the best scores are high, the more of the others are passed over.
    for (const bool first : {true, false})
      for (size_t span = 0; span < tops_.size(); ++span)
        if ((tops_[span] >= kNear) == first && tops_[span] >= floor) draw_span(span, floor, place, count, found);
  }

  void draw_span(size_t span, float floor, const Place& place, size_t count, std::vector<Guess>& found) const {
    const double bound = found.size() < count ? -kInfinity : found.back().score;
    const double needed = bound - tops_[span];  // noise that the best of the span needs
    if (needed > kGumbelMax) return;
    const uint64_t word = least_word(needed);
    const Signed least = static_cast<int64_t>(word) - Signed{};
    for (int64_t start = span * kSpan; start < static_cast<int64_t>(span + 1) * kSpan; start += 32) {
      uint64_t words[32];
      hash(place.seed, place.position, start, words);
      Signed reaching{};
      for (int i = 0; i < 32; i += 4) reaching |= *reinterpret_cast<const Signed*>(words + i) >= least;
      if (!(reaching[0] | reaching[1] | reaching[2] | reaching[3])) continue;
      for (int i = 0; i < 32; ++i) {
        const int64_t token = start + i % 8 * 4 + i / 8;
        if (words[i] < word || !(scaled_[token] >= floor)) continue;
        insert({scaled_[token] + gumbel(words[i]), token}, count, found);
      }
    }
  }

  static void insert(const Guess& guess, size_t count, std::vector<Guess>& found) {
    if (found.size() == count) {
      if (!(guess < found.back())) return;
      found.pop_back();
    }
    found.insert(std::upper_bound(found.begin(), found.end(), guess), guess);
  }
};

}  // namespace rule
