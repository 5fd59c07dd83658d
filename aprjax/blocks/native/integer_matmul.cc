// Integer products of encoded weights on processors with AVX-512 VNNI: `aprjax.blocks.dot.integer_matmul`, bit for bit.
//
// XLA has no product of 8-bit integers that is summed in groups, so that its program widens every code to a float. Here
// 64 rows of a block are decoded to bytes, in the order that VPDPBUSD reads (four columns of sixteen rows in a register),
// and multiplied with all tokens while they lie in the first-level cache. Nothing else is laid out anew: the weights are
// read as `Relaid` has them.
//
// The integers are exact, so that their order does not matter. The floats are those of `blocks/roundings.py`: the same
// operations, each rounded once, in the same order. Where a fused multiply-add stands below, the product in it is exact.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kTileRows = 64;
constexpr int kLanes = 16;
constexpr int kVectors = kTileRows / kLanes;  // registers that hold one number of each row of a tile
constexpr int kTokens = 4;                    // tokens whose sums are in registers at a time
constexpr int kPair = 2;                      // registers of rows beside them: 8 sums, 8 totals, 2 weights of 32 registers

// What a format is: elements of a block, elements that share an integer scale, bits of a code, what is subtracted from
// the unsigned code, and whether its groups have integer scales and minimums.
template <int size, int group, int bits, int offset, bool scales, bool minimums>
struct Format {
  static constexpr int kSize = size, kGroup = group, kBits = bits, kOffset = offset, kGroups = size / group;
  static constexpr bool kScales = scales, kMinimums = minimums;
};
using Q4_0 = Format<32, 32, 4, 8, false, false>;
using Q5_0 = Format<32, 32, 5, 16, false, false>;
using Q8_0 = Format<32, 32, 8, 128, false, false>;  // its codes are signed; with the sign bit turned they are unsigned
using Q4_K = Format<256, 32, 4, 0, true, true>;
using Q5_K = Format<256, 32, 5, 0, true, true>;
using Q6_K = Format<256, 16, 6, 32, true, false>;

// A `Relaid`, and the activations.
struct Operands {
  const uint8_t* low;               // [chunk, block, size * 4 / 8, row], or int8 [chunk, block, size, row]
  const uint8_t* high;              // [chunk, block, size * (bits - 4) / 8, row]
  const uint16_t* scale;            // float16 [chunk, block, row]
  const int8_t* group_scales;       // [chunk, block, group, row]
  const uint16_t* minimum;          // float16 [chunk, block, row]
  const uint8_t* group_minimums;    // [chunk, block, group, row]
  const int8_t* codes;              // [token, block, size]
  const float* activation_scale;    // [token, block]
  int64_t chunks, blocks, chunk_rows, rows, tokens, together;
  float* out;                       // [token, row]
};

// The activations' sums over each group: int32 for what an offset takes away, and pairs of int16 for minimums.
struct GroupSums {
  std::vector<int32_t> taken;    // [token, block, group]: -offset * sum
  std::vector<int16_t> sums;     // [token, block, group]: at most 32 * 127
};

// One block of 64 rows, decoded. Registers hold rows in the order in which `interleave` leaves them.
template <typename F>
struct Tile {
  alignas(64) uint8_t codes[F::kSize / 4][kVectors][64];
  alignas(64) int32_t scales[F::kGroups][kTileRows];
  alignas(64) int16_t minimums[(F::kGroups + 1) / 2][kTileRows][2];
  alignas(64) float scale[kTileRows];
  alignas(64) float minimum[kTileRows];
};

inline __m512i load_rows(const uint8_t* from, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, from); }

// The next block of the same rows is fetched into the second-level cache meanwhile: the lines of a tile lie a row of the
// layout apart, which no processor foresees. Beyond the matrix it is fetched in vain.
inline void fetch(const uint8_t* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1); }

// Four columns of 64 rows -> four registers of sixteen rows by four columns. Register v has rows 4 v ... 4 v + 3 of
// every sixteen: unpacking stays within 128 bits.
inline void interleave(const __m512i column[4], __m512i out[4]) {
  const __m512i a = _mm512_unpacklo_epi8(column[0], column[1]), b = _mm512_unpackhi_epi8(column[0], column[1]);
  const __m512i c = _mm512_unpacklo_epi8(column[2], column[3]), d = _mm512_unpackhi_epi8(column[2], column[3]);
  out[0] = _mm512_unpacklo_epi16(a, c);
  out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d);
  out[3] = _mm512_unpackhi_epi16(b, d);
}

inline void load_interleaved(const uint8_t* from, int64_t stride, int64_t next, __mmask64 mask, __m512i out[4]) {
  __m512i column[4];
  for (int index = 0; index < 4; ++index) {
    fetch(from + index * stride + next);
    column[index] = load_rows(from + index * stride, mask);
  }
  interleave(column, out);
}

// The place of a row in a tile's arrays.
constexpr int place(int row) { return (row % 16) / 4 * 16 + row / 16 * 4 + row % 4; }

// Dwords of four rows' bytes in the order of `interleave`.
inline __m512i reordered(__m512i bytes) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, bytes);
}

inline __m128i quarter(__m512i bytes, int index) {
  switch (index) {
    case 0: return _mm512_extracti32x4_epi32(bytes, 0);
    case 1: return _mm512_extracti32x4_epi32(bytes, 1);
    case 2: return _mm512_extracti32x4_epi32(bytes, 2);
    default: return _mm512_extracti32x4_epi32(bytes, 3);
  }
}

inline void decode_halves(const uint16_t* from, int64_t rows, float* to) {
  alignas(64) float values[kTileRows];
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t left = std::clamp<int64_t>(rows - vector * kLanes, 0, kLanes);
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, from + vector * kLanes);
    _mm512_store_ps(values + vector * kLanes, _mm512_cvtph_ps(halves));
  }
  for (int piece = 0; piece < kTileRows; piece += 4)
    _mm_store_ps(to + place(piece), _mm_load_ps(values + piece));
}

template <typename F>
void decode_codes(const Operands& of, int64_t block, int64_t row, __mmask64 mask, Tile<F>& tile) {
  const int64_t stride = of.chunk_rows;
  const __m512i four = _mm512_set1_epi8(15);
  const auto store = [&tile](int element, int vector, __m512i bytes) {
    _mm512_store_si512(tile.codes[element / 4][vector], bytes);
  };
  if constexpr (F::kBits == 8) {
    const uint8_t* low = of.low + block * F::kSize * stride + row;
    for (int element = 0; element < F::kSize; element += 4) {
      __m512i bytes[4];
      load_interleaved(low + element * stride, stride, F::kSize * stride, mask, bytes);
      for (int vector = 0; vector < kVectors; ++vector)
        store(element, vector, _mm512_xor_si512(bytes[vector], _mm512_set1_epi8(-128)));
    }
  } else {
    constexpr int kHalf = F::kSize / 2;
    constexpr int kHighBits = F::kBits - 4;
    constexpr int kHighBytes = kHighBits == 0 ? kHalf : F::kSize * kHighBits / 8;
    const uint8_t* low = of.low + block * kHalf * stride + row;
    const uint8_t* high = of.high + block * kHighBytes * stride + row;
    const __m512i kept = _mm512_set1_epi8(static_cast<char>((1 << kHighBits) - 1));
    // Byte j of the high plane holds the bits of elements j, j + kHighBytes, ..., lowest first.
    for (int byte = 0; byte < kHighBytes; byte += 4) {
      __m512i highs[4];
      if constexpr (kHighBits > 0) load_interleaved(high + byte * stride, stride, kHighBytes * stride, mask, highs);
      for (int element = byte; element < kHalf; element += kHighBytes) {
        __m512i lows[4];
        load_interleaved(low + element * stride, stride, kHalf * stride, mask, lows);
        for (int vector = 0; vector < kVectors; ++vector) {
          __m512i first = _mm512_and_si512(lows[vector], four);
          __m512i second = _mm512_and_si512(_mm512_srli_epi16(lows[vector], 4), four);
          if constexpr (kHighBits > 0) {
            const int shift = element / kHighBytes * kHighBits;
            const auto bits = [&](int by) {
              const __m512i moved = _mm512_srl_epi16(highs[vector], _mm_cvtsi32_si128(by));
              return _mm512_slli_epi16(_mm512_and_si512(moved, kept), 4);
            };
            first = _mm512_or_si512(first, bits(shift));
            second = _mm512_or_si512(second, bits(shift + kHalf / kHighBytes * kHighBits));
          }
          store(element, vector, first);
          store(element + kHalf, vector, second);
        }
      }
    }
  }
}

// `block` counts over the chunks; `row` is within its chunk.
template <typename F>
void decode(const Operands& of, int64_t block, int64_t row, int64_t rows, Tile<F>& tile) {
  const __mmask64 mask = rows >= 64 ? ~__mmask64{0} : (__mmask64{1} << rows) - 1;
  decode_codes<F>(of, block, row, mask, tile);
  const int64_t stride = of.chunk_rows;
  decode_halves(of.scale + block * stride + row, rows, tile.scale);
  if constexpr (F::kScales) {
    const auto* scales = reinterpret_cast<const uint8_t*>(of.group_scales) + block * F::kGroups * stride + row;
    for (int group = 0; group < F::kGroups; ++group) {
      const __m512i bytes = reordered(load_rows(scales + group * stride, mask));
      for (int vector = 0; vector < kVectors; ++vector)
        _mm512_store_si512(tile.scales[group] + vector * kLanes, _mm512_cvtepi8_epi32(quarter(bytes, vector)));
    }
  }
  if constexpr (F::kMinimums) {
    decode_halves(of.minimum + block * stride + row, rows, tile.minimum);
    const uint8_t* minimums = of.group_minimums + block * F::kGroups * stride + row;
    for (int group = 0; group < F::kGroups; group += 2) {
      const __m512i even = reordered(load_rows(minimums + group * stride, mask));
      const __m512i odd = reordered(load_rows(minimums + (group + 1) * stride, mask));
      for (int vector = 0; vector < kVectors; ++vector) {
        const __m512i lower = _mm512_cvtepu8_epi32(quarter(even, vector));
        const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu8_epi32(quarter(odd, vector)), 16);
        _mm512_store_si512(tile.minimums[group / 2][vector * kLanes], _mm512_or_si512(lower, upper));
      }
    }
  }
}

inline int32_t four_bytes(const void* from) {
  int32_t value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// `roundings.difference_of_products`: the products are exact, the three sums rounded once each.
inline __m512 difference(__m512 scale, __m512i integers, __m512 minimum, __m512i lows) {
  const __m512i kept = _mm512_set1_epi32((1 << 13) - 1);
  const __m512 above = _mm512_cvtepi32_ps(_mm512_srai_epi32(integers, 13));
  const __m512 below = _mm512_cvtepi32_ps(_mm512_and_si512(integers, kept));
  const __m512 lows_above = _mm512_cvtepi32_ps(_mm512_srai_epi32(lows, 13));
  const __m512 lows_below = _mm512_cvtepi32_ps(_mm512_and_si512(lows, kept));
  const __m512 high = _mm512_fmsub_ps(scale, above, _mm512_mul_ps(minimum, lows_above));
  const __m512 low = _mm512_fmsub_ps(scale, below, _mm512_mul_ps(minimum, lows_below));
  return _mm512_fmadd_ps(high, _mm512_set1_ps(8192.0f), low);
}

// One block of `vectors` registers of rows, from `first`, by `count` tokens, added to `sums[token][64]`.
template <typename F, int count, int vectors>
inline void multiply(const Operands& of, const GroupSums& group_sums, const Tile<F>& tile, int64_t block, int64_t token,
                     int first, float* sums) {
  const int8_t* codes[count];
  int64_t at[count];
  for (int t = 0; t < count; ++t) {
    at[t] = (token + t) * of.blocks + block;
    codes[t] = of.codes + at[t] * F::kSize;
  }
  __m512i totals[count][vectors];
#pragma GCC unroll 16
  for (int group = 0; group < F::kGroups; ++group) {
    __m512i dots[count][vectors];
    for (int t = 0; t < count; ++t) {
      __m512i start = _mm512_setzero_si512();
      if constexpr (F::kOffset != 0) start = _mm512_set1_epi32(group_sums.taken[at[t] * F::kGroups + group]);
      for (int v = 0; v < vectors; ++v) dots[t][v] = start;
    }
#pragma GCC unroll 8
    for (int step = 0; step < F::kGroup / 4; ++step) {
      const int four = group * (F::kGroup / 4) + step;
      __m512i weights[vectors];
      for (int v = 0; v < vectors; ++v) weights[v] = _mm512_load_si512(tile.codes[four][first + v]);
      for (int t = 0; t < count; ++t) {
        const __m512i activation = _mm512_set1_epi32(four_bytes(codes[t] + 4 * four));
        for (int v = 0; v < vectors; ++v) dots[t][v] = _mm512_dpbusd_epi32(dots[t][v], weights[v], activation);
      }
    }
    for (int v = 0; v < vectors; ++v) {
      if constexpr (F::kScales) {
        const __m512i scale = _mm512_load_si512(tile.scales[group] + (first + v) * kLanes);
        for (int t = 0; t < count; ++t) {
          const __m512i scaled = _mm512_mullo_epi32(dots[t][v], scale);
          totals[t][v] = group == 0 ? scaled : _mm512_add_epi32(totals[t][v], scaled);
        }
      } else {
        for (int t = 0; t < count; ++t) totals[t][v] = dots[t][v];
      }
    }
  }
  for (int v = 0; v < vectors; ++v) {
    const __m512 scale = _mm512_load_ps(tile.scale + (first + v) * kLanes);
    for (int t = 0; t < count; ++t) {
      float* sum = sums + t * kTileRows + (first + v) * kLanes;
      const __m512 outer = _mm512_set1_ps(of.activation_scale[at[t]]);
      __m512 term;
      if constexpr (F::kMinimums) {
        __m512i lows = _mm512_setzero_si512();
        for (int pair = 0; pair < F::kGroups / 2; ++pair) {
          const int32_t both = four_bytes(group_sums.sums.data() + at[t] * F::kGroups + 2 * pair);
          const __m512i minimums = _mm512_load_si512(tile.minimums[pair][(first + v) * kLanes]);
          lows = _mm512_dpwssd_epi32(lows, minimums, _mm512_set1_epi32(both));
        }
        const __m512 minimum = _mm512_load_ps(tile.minimum + (first + v) * kLanes);
        term = _mm512_mul_ps(outer, difference(scale, totals[t][v], minimum, lows));
      } else {
        term = _mm512_mul_ps(_mm512_mul_ps(outer, scale), _mm512_cvtepi32_ps(totals[t][v]));
      }
      _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), term));
    }
  }
}

template <typename F>
void multiply_tile(const Operands& of, const GroupSums& group_sums, const Tile<F>& tile, int64_t block, float* sums) {
  int64_t token = 0;
  for (; token + kTokens <= of.tokens; token += kTokens)
    for (int first = 0; first < kVectors; first += kPair)
      multiply<F, kTokens, kPair>(of, group_sums, tile, block, token, first, sums + token * kTileRows);
  for (; token < of.tokens; ++token)
    multiply<F, 1, kVectors>(of, group_sums, tile, block, token, 0, sums + token * kTileRows);
}

// Rows `row ... row + rows` of a chunk by all tokens.
template <typename F>
void multiply_rows(const Operands& of, const GroupSums& group_sums, int64_t chunk, int64_t row, int64_t rows,
                   float* run, float* total) {
  static thread_local Tile<F> tile;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, numbers = tiles * of.tokens * kTileRows;
  std::fill(total, total + numbers, 0.0f);
  for (int64_t block = 0; block < of.blocks;) {
    std::fill(run, run + numbers, 0.0f);
    for (const int64_t end = block + of.together; block < end; ++block)
      for (int64_t index = 0; index < tiles; ++index) {
        const int64_t done = index * kTileRows;
        decode<F>(of, chunk * of.blocks + block, row + done, std::min<int64_t>(rows - done, kTileRows), tile);
        multiply_tile<F>(of, group_sums, tile, block, run + index * of.tokens * kTileRows);
      }
    for (int64_t index = 0; index < numbers; ++index) total[index] += run[index];
  }
  for (int64_t index = 0; index < tiles; ++index)
    for (int64_t token = 0; token < of.tokens; ++token) {
      const int64_t start = row + index * kTileRows, whole = chunk * of.chunk_rows + start;
      const int64_t left = std::min({rows - index * kTileRows, of.rows - whole, int64_t{kTileRows}});
      const float* from = total + (index * of.tokens + token) * kTileRows;
      float* to = of.out + token * of.rows + whole;
      for (int64_t piece = 0; piece < left; piece += 4) {
        const float* four = from + place(static_cast<int>(piece));
        if (piece + 4 <= left) {
          _mm_storeu_ps(to + piece, _mm_load_ps(four));
        } else {
          std::copy(four, four + (left - piece), to + piece);
        }
      }
    }
}

template <typename F>
GroupSums sum_groups(const Operands& of) {
  GroupSums sums;
  const int64_t groups = of.tokens * of.blocks * F::kGroups;
  if constexpr (F::kOffset != 0) sums.taken.resize(groups);
  if constexpr (F::kMinimums) sums.sums.resize(groups);
  for (int64_t index = 0; index < groups; ++index) {
    const int8_t* codes = of.codes + index * F::kGroup;
    int32_t sum = 0;
    for (int element = 0; element < F::kGroup; ++element) sum += codes[element];
    if constexpr (F::kOffset != 0) sums.taken[index] = -F::kOffset * sum;
    if constexpr (F::kMinimums) sums.sums[index] = static_cast<int16_t>(sum);
  }
  return sums;
}

// XLA's threads flush subnormal numbers, and its program's numbers are the measure: so do these, wherever they run.
class Flushing {
 public:
  Flushing() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~Flushing() { _mm_setcsr(before_); }

 private:
  const unsigned int before_;
};

// Runs `work(index)` for `count` indices on the calling thread and on those of `pool` that are free. It waits only for
// work that has begun, so that no thread of the pool waits for another that waits, too.
template <typename Work>
void share(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  const auto state = std::make_shared<State>();
  const auto take = [state, count, &work] {
    const Flushing flushing;
    for (;;) {
      const int64_t index = state->next.fetch_add(1);
      if (index >= count) return;
      work(index);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  // A thread that comes late finds no index left and touches nothing of the caller's.
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule([take] { take(); });
  take();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// Sums that a task has at least: with few tokens it takes more rows, which lie one beside the other in memory.
constexpr int64_t kFewestNumbers = 1 << 10;
// Tasks for each thread at least, where there are as many tiles: who is done first takes the next.
constexpr int64_t kTasksOfAThread = 2;

template <typename F>
void run(const Operands& of, ffi::ThreadPool& pool) {
  const GroupSums group_sums = sum_groups<F>(of);
  const int64_t all = of.chunks * ((of.chunk_rows + kTileRows - 1) / kTileRows);
  const int64_t shared = all / (kTasksOfAThread * std::max<int64_t>(1, pool.num_threads()));
  const int64_t tiles = std::max<int64_t>(1, std::min(shared, kFewestNumbers / (of.tokens * kTileRows)));
  const int64_t rows = tiles * kTileRows, tasks = (of.chunk_rows + rows - 1) / rows;
  share(pool, of.chunks * tasks, [&](int64_t index) {
    static thread_local std::vector<__m512> run, total;
    const size_t numbers = static_cast<size_t>(tiles * of.tokens * kTileRows / kLanes);
    if (run.size() < numbers) {
      run.resize(numbers);
      total.resize(numbers);
    }
    const int64_t chunk = index / tasks, row = index % tasks * rows;
    if (chunk * of.chunk_rows + row >= of.rows) return;
    multiply_rows<F>(of, group_sums, chunk, row, std::min(rows, of.chunk_rows - row), reinterpret_cast<float*>(run.data()),
                     reinterpret_cast<float*>(total.data()));
  });
}

ffi::Error integer_matmul(ffi::ThreadPool pool, std::string_view format, int64_t together, ffi::AnyBuffer low,
                          ffi::Buffer<ffi::U8> high, ffi::Buffer<ffi::F16> scale, ffi::Buffer<ffi::S8> group_scales,
                          ffi::Buffer<ffi::F16> minimum, ffi::Buffer<ffi::U8> group_minimums,
                          ffi::Buffer<ffi::S8> codes, ffi::Buffer<ffi::F32> activation_scale,
                          ffi::ResultBuffer<ffi::F32> out) {
  const auto scales = scale.dimensions(), made = out->dimensions();
  Operands of{static_cast<const uint8_t*>(low.untyped_data()),
              high.typed_data(),
              reinterpret_cast<const uint16_t*>(scale.typed_data()),
              group_scales.typed_data(),
              reinterpret_cast<const uint16_t*>(minimum.typed_data()),
              group_minimums.typed_data(),
              codes.typed_data(),
              activation_scale.typed_data(),
              scales[0],
              scales[1],
              scales[2],
              made[1],
              made[0],
              together,
              out->typed_data()};
  if (of.tokens == 0 || of.rows == 0) return ffi::Error::Success();
  if (format == "Q4_0") run<Q4_0>(of, pool);
  else if (format == "Q5_0") run<Q5_0>(of, pool);
  else if (format == "Q8_0") run<Q8_0>(of, pool);
  else if (format == "Q4_K") run<Q4_K>(of, pool);
  else if (format == "Q5_K") run<Q5_K>(of, pool);
  else if (format == "Q6_K") run<Q6_K>(of, pool);
  else return ffi::Error::InvalidArgument("no kernel for " + std::string(format));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(aprjax_integer_matmul, integer_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("format")
                                  .Attr<int64_t>("together")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
