// AVX2. The 32 rows of a unit are four registers, taken one after the other within a block, so that codes are read from
// memory once and in order. vpmaddubsw multiplies bytes and adds pairs to 16 bits, which hold the sums of a whole block
// of 1-bit and 2-bit digits (128 columns: at most 32 * 2 * 3 * 127 = 24,384) and of 32 columns of 4-bit ones
// (8 * 2 * 15 * 127 = 30,480); then they are widened. An 8-bit digit would not fit: its halves are multiplied apart.

#include <immintrin.h>

namespace {
constexpr int kWidth = 8;
}

#include "dense.h"
#include "latents.h"

namespace ptq161 {
namespace {

constexpr int kAhead = 4096;  // bytes

inline __m256i four_columns(const int8_t* q) {
    int32_t word;
    std::memcpy(&word, q, sizeof word);
    return _mm256_set1_epi32(word);
}

// Not inlined, and unrolled by hand: GCC 12 then keeps the sums in registers.
template <int kBits, int kTokens>
__attribute__((noinline)) void some_tokens(const Group& group, const uint8_t* codes, const int8_t* q, int64_t q_stride, const float* scale,
                 int64_t scale_stride, Rows* dot) {
    constexpr int kColumns = 32 / kBits, kPerBlock = kBlock / kColumns;
    constexpr int kPart = kBits < 8 ? kBits : 4, kParts = kBits / kPart, kPlanes = 8 / kPart;  // bits multiplied at once
    constexpr int kPerSum = kBits < 4 ? kPerBlock : kBits;  // units that 16 bits can hold
    const __m256i mask = _mm256_set1_epi8(char((1 << kPart) - 1)), ones = _mm256_set1_epi16(1);
    for (int t = 0; t < kTokens; ++t) std::memset(dot[t], 0, sizeof dot[t]);
    for (int64_t first = 0; first < group.units; first += kPerBlock, ++scale) {
        const int64_t last = std::min<int64_t>(group.units, first + kPerBlock);
        for (int row = 0; row < kTileRows; row += 8) {
            __m256i wide[kTokens];
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) wide[t] = _mm256_setzero_si256();
            for (int64_t start = first; start < last; start += kPerSum) {
                __m256i sums[kParts][kTokens];
#pragma GCC unroll 4
                for (int t = 0; t < kTokens; ++t) sums[0][t] = sums[kParts - 1][t] = _mm256_setzero_si256();
                const int64_t end = std::min<int64_t>(last, start + kPerSum);
                for (int64_t unit = start; unit < end; ++unit) {
                    const uint8_t* place = codes + unit * kUnitBytes + 4 * row;
                    if (row % 16 == 0) _mm_prefetch(reinterpret_cast<const char*>(place + kAhead), _MM_HINT_T0);
                    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place));
                    const int8_t* columns = q + unit * kColumns;
#pragma GCC unroll 8
                    for (int k = 0; k < kPlanes; ++k) {
                        const __m256i digits = _mm256_and_si256(_mm256_srli_epi32(words, kPart * k), mask);
#pragma GCC unroll 4
                        for (int t = 0; t < kTokens; ++t) {
                            const __m256i four = four_columns(columns + t * q_stride + 4 * (k / kParts));
                            __m256i& sum = sums[k % kParts][t];
                            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(digits, four));
                        }
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < kTokens; ++t) {
                    wide[t] = _mm256_add_epi32(wide[t], _mm256_madd_epi16(sums[0][t], ones));
                    if (kParts == 1) continue;
                    const __m256i high = _mm256_madd_epi16(sums[kParts - 1][t], ones);
                    wide[t] = _mm256_add_epi32(wide[t], _mm256_slli_epi32(high, kPart));
                }
            }
            for (int t = 0; t < kTokens; ++t) {
                const __m256 factor = _mm256_set1_ps(scale[t * scale_stride]);
                const __m256 sum = _mm256_loadu_ps(dot[t] + row);
                _mm256_storeu_ps(dot[t] + row, _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide[t]), factor, sum));
            }
        }
    }
}

template <int kBits>
void any_tokens(const Group& group, const uint8_t* codes, const int8_t* q, int64_t q_stride, const float* scale,
                int64_t scale_stride, int tokens, Rows* dot) {
    const auto some = [&](auto count, int t) {
        some_tokens<kBits, decltype(count)::value>(group, codes, q + t * q_stride, q_stride, scale + t * scale_stride,
                                                   scale_stride, dot + t);
    };
    int t = 0;
    for (; tokens - t >= 4; t += 4) some(std::integral_constant<int, 4>(), t);
    if (tokens - t >= 2) some(std::integral_constant<int, 2>(), t), t += 2;
    if (tokens - t == 1) some(std::integral_constant<int, 1>(), t);
}

void dot_int8(const Group& group, const uint8_t* codes, const int8_t* q, int64_t q_stride, const float* scale,
              int64_t scale_stride, int tokens, Rows* dot) {
    switch (group.bits) {
        case 1: return any_tokens<1>(group, codes, q, q_stride, scale, scale_stride, tokens, dot);
        case 2: return any_tokens<2>(group, codes, q, q_stride, scale, scale_stride, tokens, dot);
        case 4: return any_tokens<4>(group, codes, q, q_stride, scale, scale_stride, tokens, dot);
        default: return any_tokens<8>(group, codes, q, q_stride, scale, scale_stride, tokens, dot);
    }
}

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2", supported, gather, multiply<dot_int8, dot_exact>, dense, round_rows, round_rows_backward,
                      search_rows};

}  // namespace ptq161
