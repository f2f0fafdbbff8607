// AVX-512 with VNNI. The 32 rows of a unit are two registers; one vpdpbusd multiplies four columns of 16 rows.
//
// One token is bound by memory, if little is done per byte: codes are masked where they are, not shifted down, so that
// digit k of a byte counts 2^(bits * k) times too much; each k has an accumulator of its own, which also keeps the
// multipliers busy, and is shifted down once per block. Bytes of 1-bit codes are split in nibbles first, for four
// accumulators instead of eight. Codes are fetched ahead by hand, across the ends of groups and tiles.
//
// Several tokens are bound by vpdpbusd: digits are shifted down once and used for all tokens, 12 of them in 24 registers.

#include <immintrin.h>

namespace {
constexpr int kWidth = 16;
}

#include "dense.h"
#include "latents.h"

namespace ptq161 {
namespace {

constexpr int kAhead = 4096;  // bytes; a DRAM access takes as long as about 3 KB of codes

inline __m512i four_columns(const int8_t* q) {
    int32_t word;
    std::memcpy(&word, q, sizeof word);
    return _mm512_set1_epi32(word);
}

inline __m512 scaled(__m512i products, float scale, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(scale), sum);
}

// Sum of the accumulators of one register of rows, each shifted down to its digit's place.
template <int kBits, int kCount>
inline __m512i combined(const __m512i* sums) {
    __m512i whole = sums[0];
    for (int k = 1; k < kCount; ++k) whole = _mm512_add_epi32(whole, _mm512_srai_epi32(sums[k], kBits * k));
    return whole;
}

template <int kBits>
__attribute__((noinline)) void one_token(const Group& group, const uint8_t* codes, const int8_t* q, const float* scale, float* out) {
    constexpr int kColumns = 32 / kBits, kPlanes = 8 / kBits, kSums = kPlanes < 4 ? kPlanes : 4;
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t first = 0; first < group.units; first += kBlock / kColumns, ++scale) {
        const int64_t last = std::min<int64_t>(group.units, first + kBlock / kColumns);
        __m512i sums[2][kSums];
#pragma GCC unroll 8
        for (int k = 0; k < kSums; ++k) sums[0][k] = sums[1][k] = _mm512_setzero_si512();
        for (int64_t unit = first; unit < last; ++unit, codes += kUnitBytes, q += kColumns) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + 64), _MM_HINT_T0);
            __m512i words[2] = {_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64)};
#pragma GCC unroll 8
            for (int k = 0; k < kPlanes; ++k) {
                if (k == kSums) {
                    words[0] = _mm512_srli_epi32(words[0], 4);
                    words[1] = _mm512_srli_epi32(words[1], 4);
                }
                const int place = k % kSums;
                const __m512i mask = _mm512_set1_epi8(char(((1 << kBits) - 1) << (kBits * place)));
                const __m512i columns = four_columns(q + 4 * k);
                sums[0][place] = _mm512_dpbusd_epi32(sums[0][place], _mm512_and_si512(words[0], mask), columns);
                sums[1][place] = _mm512_dpbusd_epi32(sums[1][place], _mm512_and_si512(words[1], mask), columns);
            }
        }
        low = scaled(combined<kBits, kSums>(sums[0]), *scale, low);
        high = scaled(combined<kBits, kSums>(sums[1]), *scale, high);
    }
    _mm512_storeu_ps(out, low);
    _mm512_storeu_ps(out + 16, high);
}

// Not inlined, and unrolled by hand: GCC 12 then keeps the sums in registers.
template <int kBits, int kTokens>
__attribute__((noinline)) void some_tokens(const Group& group, const uint8_t* codes, const int8_t* q, int64_t q_stride, const float* scale,
                 int64_t scale_stride, Rows* dot) {
    constexpr int kColumns = 32 / kBits, kPlanes = 8 / kBits;
    const __m512i mask = _mm512_set1_epi8(char((1 << kBits) - 1));
    for (int t = 0; t < kTokens; ++t) std::memset(dot[t], 0, sizeof dot[t]);
    for (int64_t first = 0; first < group.units; first += kBlock / kColumns, ++scale) {
        const int64_t last = std::min<int64_t>(group.units, first + kBlock / kColumns);
        __m512i sums[kTokens][2];
#pragma GCC unroll 12
        for (int t = 0; t < kTokens; ++t) sums[t][0] = sums[t][1] = _mm512_setzero_si512();
        for (int64_t unit = first; unit < last; ++unit, codes += kUnitBytes, q += kColumns) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + 64), _MM_HINT_T0);
            const __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + 64);
#pragma GCC unroll 8
            for (int k = 0; k < kPlanes; ++k) {
                const __m512i low_digits = _mm512_and_si512(_mm512_srli_epi32(low, kBits * k), mask);
                const __m512i high_digits = _mm512_and_si512(_mm512_srli_epi32(high, kBits * k), mask);
#pragma GCC unroll 12
                for (int t = 0; t < kTokens; ++t) {
                    const __m512i columns = four_columns(q + t * q_stride + 4 * k);
                    sums[t][0] = _mm512_dpbusd_epi32(sums[t][0], low_digits, columns);
                    sums[t][1] = _mm512_dpbusd_epi32(sums[t][1], high_digits, columns);
                }
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < kTokens; ++t) {
            const float factor = scale[t * scale_stride];
            _mm512_storeu_ps(dot[t], scaled(sums[t][0], factor, _mm512_loadu_ps(dot[t])));
            _mm512_storeu_ps(dot[t] + 16, scaled(sums[t][1], factor, _mm512_loadu_ps(dot[t] + 16)));
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
    for (; tokens - t >= 12; t += 12) some(std::integral_constant<int, 12>(), t);
    for (; tokens - t >= 6; t += 6) some(std::integral_constant<int, 6>(), t);
    if (tokens - t >= 4) some(std::integral_constant<int, 4>(), t), t += 4;
    if (tokens - t == 3) some(std::integral_constant<int, 3>(), t), t += 3;
    if (tokens - t == 2) some(std::integral_constant<int, 2>(), t), t += 2;
    if (tokens - t == 1) one_token<kBits>(group, codes, q + t * q_stride, scale + t * scale_stride, dot[t]);
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

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace

extern const Kernel kAvx512;
const Kernel kAvx512 = {"avx512", supported, gather, multiply<dot_int8, dot_exact>, dense, round_rows, round_rows_backward,
                        search_rows};

}  // namespace ptq161
