// NEON with the dot-product instructions of ARMv8.2. The 32 rows of a unit are eight registers, taken two at a time
// within a block; one sdot multiplies four columns of four rows. Digits are below 128, so signed bytes hold them; those
// of 8 bits are multiplied in two halves.

#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {
constexpr int kWidth = 4;
}

#include "dense.h"
#include "latents.h"

namespace ptq161 {
namespace {

inline int8x16_t four_columns(const int8_t* q) {
    int32_t word;
    std::memcpy(&word, q, sizeof word);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

template <int kBits, int kTokens>
void some_tokens(const Group& group, const uint8_t* codes, const int8_t* q, int64_t q_stride, const float* scale,
                 int64_t scale_stride, Rows* dot) {
    constexpr int kColumns = 32 / kBits;
    constexpr int kPart = kBits < 8 ? kBits : 4, kParts = kBits / kPart, kPlanes = 8 / kPart;  // bits multiplied at once
    const uint8x16_t mask = vdupq_n_u8((1 << kPart) - 1);
    for (int t = 0; t < kTokens; ++t) std::memset(dot[t], 0, sizeof dot[t]);
    for (int64_t first = 0; first < group.units; first += kBlock / kColumns, ++scale) {
        const int64_t last = std::min<int64_t>(group.units, first + kBlock / kColumns);
        for (int row = 0; row < kTileRows; row += 8) {
            int32x4_t sums[kTokens][kParts][2];
            for (int t = 0; t < kTokens; ++t) {
                for (auto& part : sums[t]) part[0] = part[1] = vdupq_n_s32(0);
            }
            for (int64_t unit = first; unit < last; ++unit) {
                const uint8_t* place = codes + unit * kUnitBytes + 4 * row;
                const uint8x16_t words[2] = {vld1q_u8(place), vld1q_u8(place + 16)};
                const int8_t* columns = q + unit * kColumns;
                for (int k = 0; k < kPlanes; ++k) {
                    const int8x16_t shift = vdupq_n_s8(int8_t(-kPart * k));  // to the right
                    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(vshlq_u8(words[0], shift), mask));
                    const int8x16_t high = vreinterpretq_s8_u8(vandq_u8(vshlq_u8(words[1], shift), mask));
                    for (int t = 0; t < kTokens; ++t) {
                        const int8x16_t four = four_columns(columns + t * q_stride + 4 * (k / kParts));
                        int32x4_t* sum = sums[t][k % kParts];
                        sum[0] = vdotq_s32(sum[0], low, four);
                        sum[1] = vdotq_s32(sum[1], high, four);
                    }
                }
            }
            for (int t = 0; t < kTokens; ++t) {
                for (int half = 0; half < 2; ++half) {
                    float* out = dot[t] + row + 4 * half;
                    int32x4_t sum = sums[t][0][half];
                    if (kParts == 2) sum = vaddq_s32(sum, vshlq_n_s32(sums[t][kParts - 1][half], kPart));
                    vst1q_f32(out, vfmaq_n_f32(vld1q_f32(out), vcvtq_f32_s32(sum), scale[t * scale_stride]));
                }
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

bool supported() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;  // every processor that runs macOS on ARM has them
#endif
}

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = {"neon", supported, gather, multiply<dot_int8, dot_exact>, dense, round_rows, round_rows_backward,
                      search_rows};

}  // namespace ptq161
